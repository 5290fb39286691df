"""Fit the constants of llama_nb.scale.cluster to published_throughput.csv, and predict each row without itself.

    python benchmarks/calibrate.py          # writes published_fit.csv, prints the constants for the page

A least-squares fit of ln(predicted / published) with a loss that grows like |x| above 5 %, so that one odd row
does not bend the rest. Each constant has a prior, which weighs as much as one row: what a physicist would say
before having seen a row. The paper's own four rows count three times (`weight`). Nothing depends on the name of a model or source.
"""
import csv, math, os, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from llama_nb.scale.cluster import Constants, published_rows

PRIOR = {  # mean, standard deviation
    'ampere': (.85, .1), 'hopper': (.7, .1), 'megatron': (.75, .1), # rates of large matrices alone
    'power': (1/3, .1),                                             # P = f V^2, V rising with f
    'stream': (.7, .2), 'link': (.75, .1), 'network': (.8, .1),     # what benchmarks of copies and NCCL reach
    'latency': (5e-6, 2.5e-6), 'overlap': (.9, .05), 'overlap_tensor': (.5, .2)}
MEAN, WIDTH = (np.array(column) for column in zip(*PRIOR.values()))
ODD = .05                                                           # a residual from which on a row is odd

def constants_of(z): return Constants(*map(float, MEAN + WIDTH*z))  # z: in standard deviations of the prior

def residuals(rows, z): # in units of `ODD`; those of the prior last
    k = constants_of(z)
    errors = [row.weight*math.log(row.predict(k)/row.published)/ODD for row in rows]
    return np.array(errors + list(z))

def cost(r, n): # soft L1 for `n` rows, squares for the prior
    return (np.sqrt(1 + r[:n]**2) - 1).sum() + (r[n:]**2).sum()/2

def fit(rows, z=None, turns=40):
    "Gauss-Newton, damped, rows weighted anew in each turn (soft L1)"
    z, damping, n = np.zeros(len(MEAN)) if z is None else z, 1e-3, len(rows)
    r = residuals(rows, z)
    for _ in range(turns):
        slopes = np.array([(residuals(rows, z + .01*e) - r)/.01 for e in np.eye(len(z))]).T
        weights = np.ones(len(r))
        weights[:n] = 1/np.sqrt(1 + r[:n]**2)
        normal = (slopes.T*weights)@slopes
        step = np.linalg.solve(normal + damping*np.diag(np.diag(normal)), -(slopes.T*weights)@r)
        new = residuals(rows, z + step)
        if cost(new, n) < cost(r, n):
            z, r, damping = z + step, new, damping/3
            if np.abs(step).max() < 1e-4: break
        else:
            damping *= 5
    return z

def without(rows, out, z):
    "Predictions of the rows `out` by constants that have not seen them"
    k = constants_of(fit([row for i, row in enumerate(rows) if i not in out], z))
    return [rows[i].predict(k) for i in out]

def main():
    rows = published_rows(HERE/'published_throughput.csv')
    z = fit(rows)
    k = constants_of(z)
    sources = sorted({row.source for row in rows})
    groups = [[i for i, row in enumerate(rows) if row.source == source] for source in sources]
    with ProcessPoolExecutor(int(os.environ.get('JOBS', 1))) as pool:
        alone = [f for f in (pool.submit(without, rows, [i], z) for i in range(len(rows)))]
        whole = [f for f in (pool.submit(without, rows, group, z) for group in groups)]
    source_out = {i: x for group, f in zip(groups, whole) for i, x in zip(group, f.result())}
    with open(HERE/'published_fit.csv', 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f, lineterminator='\n')
        out.writerow(['row', 'model', 'gpu', 'gpus', 'stack', 'published', 'predicted', 'without_the_row',
                      'without_its_source'])
        for i, row in enumerate(rows):
            numbers = row.published, row.predict(k), alone[i].result()[0], source_out[i]
            name = row.model, row.cluster.gpu.name, row.cluster.gpus, row.cluster.stack
            out.writerow([i, *name, *(f'{x:.1f}' for x in numbers)])
    print(',\n'.join(f'    {name}={getattr(k, name):.4g}' for name in PRIOR))

if __name__ == '__main__': main()
