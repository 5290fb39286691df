"""Dry runs of many layouts: one process imports, and each dry run is a forked child, for the layouts that
DTensor has worked out last as long as their process."""
import json, os, sys, traceback
from dataclasses import replace
import torch
from llama_nb.config import ModelConfig
from llama_nb.core import UserError
from llama_nb.run_file import load_run
from llama_nb.scale.dryrun import dry_step
from llama_nb.settings import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig

RESIZE = torch.UntypedStorage.resize_                        # a dry run replaces it, and puts it back
MODEL = ModelConfig(512, 6, 8, vocab_size=2560, multiple_of=64, max_seq_len=512)

def small(layout, recompute, accumulate=1, compile='off', dtype='bfloat16', documents='cross', model=None):
    "A run of 2 x 512 tokens in a micro-batch"
    replicate, shard, tensor = layout
    data = DataConfig('nowhere', seq_len=512, batch_size=2*accumulate*replicate*shard, documents=documents)
    train = TrainConfig(steps=10, micro_batch_size=2, dtype=dtype, recompute=recompute, compile=compile)
    return RunConfig('nowhere', replace(MODEL, **(model or {})), data, train, OptimConfig(warmup_steps=1),
                     ParallelConfig(*layout))

def answer(config, rank=0, world_size=None):
    "What a test needs of a dry run, or the error's text"
    try:
        run = dry_step(config, world_size, rank)
    except UserError as error:
        return {'error': str(error)}
    assert not torch.distributed.is_initialized() and torch.UntypedStorage.resize_ is RESIZE
    names = ('layout', 'peak', 'phase', 'memory', 'most', 'closed_form', 'collectives', 'seconds',
             'process_bytes')
    return {name: getattr(run, name) for name in names} | {'timeline': len(run.timeline)}

def forked(config, **more):
    "`answer` of a child of this process"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(writing, 'w') as f: json.dump(answer(config, **more), f)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as f: text = f.read()
    assert os.waitpid(child, 0)[1] == 0, config
    return json.loads(text)

def cases(cases): return [forked(small(*case)) for case in cases]

def file(path, settings, world_size): return forked(load_run(path, settings), world_size=world_size)

def ranks(case, ranks): return [forked(small(*case), rank=rank) for rank in ranks]

if __name__ == '__main__':
    name, arguments = map(json.loads, sys.argv[1:])
    print(json.dumps(globals()[name](*arguments)))
