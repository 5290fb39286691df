"""Fit the constants of llama_nb.scale.cluster to published_throughput.csv; predict each row without itself.

    python benchmarks/calibrate.py          # writes published_fit.csv, prints the constants for the page

Least squares of ln(predicted / published), with a loss that grows like |x| above 5 %, so that one odd row
does not bend the rest. Each constant has a prior, which weighs as much as one row: what one would say
before having seen a row. The errors of the paper's own four rows are taken three times as large (`weight`):
within the 5 % they count nine times, far out three times. Nothing depends on the name of a model or of a
source. It begins at the page's constants, and takes half a minute. Leaving a row out goes by the slopes of
the whole fit; leaving a source out, with all that its publisher says, is a fit of its own.
"""
import csv, math, sys
from pathlib import Path
import numpy as np
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from llama_nb.scale.cluster import CONSTANTS, Constants
from llama_nb.scale.published import published_rows

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

def weights_of(r, n):
    w = np.ones(len(r))
    w[:n] = 1/np.sqrt(1 + r[:n]**2)
    return w

def slopes_of(rows, z, r): return np.array([(residuals(rows, z + .01*e) - r)/.01 for e in np.eye(len(z))]).T

def fit(rows, z=None, turns=40):
    "Gauss-Newton, damped, rows weighted anew in each turn"
    z, damping, n = np.zeros(len(MEAN)) if z is None else z, 1e-3, len(rows)
    r, slopes = residuals(rows, z), None
    for _ in range(turns):
        if slopes is None: slopes = slopes_of(rows, z, r)
        weighted = slopes.T*weights_of(r, n)
        normal = weighted@slopes
        step = np.linalg.solve(normal + damping*np.diag(np.diag(normal)), -weighted@r)
        new = residuals(rows, z + step)
        if cost(new, n) < cost(r, n):
            z, r, slopes, damping = z + step, new, None, damping/3
            if np.abs(step).max() < 1e-2: break
        else:
            damping *= 5
    return z

def without_row(i, z, r, slopes):
    "The fit without row `i`, by the slopes of the whole fit: it moves little"
    r, slopes, n = np.delete(r, i), np.delete(slopes, i, 0), len(r) - len(z) - 1
    step = np.zeros(len(z))
    for _ in range(10):
        now = r + slopes@step
        weighted = slopes.T*weights_of(now, n)
        step = step - np.linalg.solve(weighted@slopes, weighted@now)
    return z + step

def publisher(row): return row.source.split()[0].rstrip(',') # of several documents, perhaps

def without_source(rows, z): # row -> the prediction by constants that have seen nothing of its publisher
    found = {}
    for who in sorted({*map(publisher, rows)}):
        k = constants_of(fit([row for row in rows if publisher(row) != who], z))
        found |= {i: row.predict(k) for i, row in enumerate(rows) if publisher(row) == who}
    return found

def main():
    rows = published_rows(HERE/'published_throughput.csv')
    z = fit(rows, (np.array([getattr(CONSTANTS, name) for name in PRIOR]) - MEAN)/WIDTH)
    k, r = constants_of(z), residuals(rows, z)
    slopes, unseen = slopes_of(rows, z, r), without_source(rows, z)
    with open(HERE/'published_fit.csv', 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f, lineterminator='\n')
        out.writerow(['row', 'model', 'gpu', 'gpus', 'stack', 'published', 'predicted', 'without_the_row',
                      'without_its_source'])
        for i, row in enumerate(rows):
            alone = row.predict(constants_of(without_row(i, z, r, slopes)))
            name = row.model, row.cluster.gpu.name, row.cluster.gpus, row.cluster.stack
            out.writerow([i, *name, *(f'{x:.1f}' for x in (row.published, row.predict(k), alone, unseen[i]))])
    print(',\n'.join(f'    {name}={getattr(k, name):.4g}' for name in PRIOR))

if __name__ == '__main__': main()
