"""A dry run of each run file in configs/ on its cluster, beside the closed forms: memory by category, the
memory over a step, and the collectives. Writes dryrun.json next to this file, for the page on dry runs.

    python benchmarks/dryrun.py               # all; some minutes on two cores
    python benchmarks/dryrun.py 65B           # one of them; the others stay as they are
"""
import json, os, platform, sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
import torch
from llama_nb.run_file import load_run
from llama_nb.scale.dryrun import KINDS, dry_run

HERE = Path(__file__).resolve().parent
WORLD = {'7B': 512, '13B': 1024, '33B': 2048, '65B': 2048}    # GPUs of the run files

def row(name:str)->dict:
    "What the page needs of a dry run"
    config = load_run(HERE.parent/'configs'/f'{name}.toml')
    run = dry_run(config, world_size=WORLD[name], timeout=3600)
    found = asdict(run)
    del found['config']
    made = {'date': str(date.today()), 'torch': torch.__version__, 'python': platform.python_version(),
            'cores': os.cpu_count(), 'load': round(os.getloadavg()[0], 1)}
    timeline = [[phase, *(round(x/1e6) for x in sizes)] for phase, *sizes in run.timeline]  # MB
    return {**found, 'timeline': timeline, 'closed_form': run.closed_form, 'made': made}

def store(name:str, found:dict):
    path = HERE/'dryrun.json'
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[name] = found
    ordered = {'kinds': KINDS} | {n: rows[n] for n in WORLD if n in rows}
    path.write_text(json.dumps(ordered, separators=(',', ':')).replace('],[', '],\n[') + '\n')

def main(names:list[str]):
    for name in names or WORLD:
        found = row(name)
        store(name, found)
        print(f'{name}: {found["peak"]/1e9:.1f} GB in {found["seconds"]:.0f} s', flush=True)

if __name__ == '__main__': main(sys.argv[1:])
