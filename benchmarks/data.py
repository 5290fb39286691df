"""How fast text goes through the stages of section 2.1, beside libraries that do the same; and the memory.

    pip install datatrove orjson spacy 'xxhash<4'       # what datatrove 0.10 wants for these stages
    llama-nb data mini runs/mini
    python benchmarks/data.py runs/mini [NAME]          # of the table, data if none is given

One process and one thread. Contestants take turns, in an order that changes; medians of their processor time,
in MB (10^6 bytes of text in UTF-8) per second. Memory: the largest resident set of a process of its own, over
inputs that grow. The table goes into NAME.md.
"""
import platform, random, resource, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/'tests'))
TURNS = 5

def spent()->float: # seconds
    "Processor time of this process and of those that it has ended"
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)

def contest(work:dict, megabytes:float, turns:int=TURNS)->dict: # name -> MB per second of processor time
    "Medians of functions that take turns"
    seconds, order = {name: [] for name in work}, random.Random(0)
    for _ in range(turns):
        names = list(work)
        order.shuffle(names)
        for name in names:
            start = spent()
            work[name]()
            seconds[name].append(spent() - start)
    return {name: megabytes/statistics.median(s) for name, s in seconds.items()}

def size(docs)->float: return sum(len(d.text.encode()) for d in docs)/1e6

# --- each source, from raw to clean ---------------------------------------------------------------

def raw_bytes(inputs:dict)->int:
    "Of the files, unpacked"
    from llama_nb.data.documents import open_stream
    total = 0
    for path in inputs.values():
        with open_stream(path) as stream:
            while block := stream.read(2**20):
                total += len(block)
    return total

def sources(corpus:Path)->list[tuple]: # title, MB raw, MB per second
    "`data clean` of every source of a mini corpus, with the models that were trained there"
    from llama_nb.data.corpus import clean_source
    from llama_nb.data.pipeline import SOURCES, Models, find_files
    names = [str(corpus/'models'/name) for name in ('language.bin', 'en.arpa', 'reference.bin')]
    rows = []
    for source in SOURCES:
        inputs = find_files(source, [corpus/'raw'/source])
        models = Models(*names) if source == 'commoncrawl' else Models()
        def clean():
            with tempfile.TemporaryDirectory() as out: clean_source(source, inputs, out, models=models)
        megabytes = raw_bytes(inputs)/1e6
        rows.append((source, megabytes, contest({'': clean}, megabytes, 3)['']))
        print(*rows[-1], flush=True)
    return rows

# --- stages beside other libraries ----------------------------------------------------------------

def stages(docs, corpus:Path, folder:Path)->list[tuple]: # stage, {who: MB per second}
    "What others have too, on the same documents"
    megabytes, rows = size(docs), []
    for name, work in (('read JSON lines (zstd)', reading(docs, folder)),
                       ('write JSON lines (zstd)', writing(docs, folder)),
                       ('MinHash of 5-word shingles', minhashes(docs)),
                       ('tokenise', tokenising(docs, corpus))):
        rows.append((name, contest(work, megabytes)))
        print(*rows[-1], flush=True)
    return rows

def reading(docs, folder):
    from datatrove.pipeline.readers import JsonlReader
    from llama_nb.data.documents import write_jsonl
    from llama_nb.data.sources import read_documents
    place = folder/'read'
    place.mkdir()
    write_jsonl(docs, place/'part.jsonl.zst')
    def theirs():
        reader = JsonlReader(str(place), compression='zstd', glob_pattern='*.jsonl.zst', doc_progress=False)
        return sum(1 for _ in reader.run())
    def ours(): return sum(1 for _ in read_documents(place))
    assert ours() == theirs() == len(docs)
    return {'llama_nb': ours, 'datatrove': theirs}

def writing(docs, folder):
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.writers import JsonlWriter
    from llama_nb.data.documents import write_jsonl
    copies = [Theirs(text=d.text, id=d.id, metadata={'source': d.source}) for d in docs]
    def theirs():
        with JsonlWriter(str(folder/'theirs'), 'part${rank}.jsonl.zst', 'zstd') as writer:
            for doc in copies: writer.write(doc)
    return {'llama_nb': lambda: write_jsonl(docs, folder/'ours.jsonl.zst'), 'datatrove': theirs}

def minhashes(docs):
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from llama_nb.data.dedup import minhash, shingles
    config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8)
    stage = MinhashDedupSignature('unused', config)
    def ours():
        for doc in docs:
            if len(found := shingles(doc.text)): minhash(found, 128)
    def theirs():
        for doc in docs:
            if len(found := stage.get_shingles(doc.text)): stage.get_signature(found)
    return {'llama_nb': ours, 'datatrove': theirs}

def tokenising(docs, corpus):
    from llama_nb.data.tokenizer import Tokenizer
    from test_data_mini import hugging_face
    tokenizer, fast = Tokenizer(corpus/'tokenizer.model'), hugging_face(corpus/'tokenizer.model')
    def ours(): return sum(len(tokenizer.encode(d.text, bos=False)) for d in docs)
    def theirs(): return sum(len(fast.encode(d.text, add_special_tokens=False).ids) for d in docs)
    assert ours() == theirs()
    return {'llama_nb (SentencePiece)': ours, 'tokenizers': theirs}

# --- the loader -----------------------------------------------------------------------------------

def loader(docs, corpus:Path, folder:Path)->list[tuple[int, float]]: # files, million tokens per second
    "The same tokens in one file and in some thousand"
    from llama_nb.data.loader import Loader
    from llama_nb.data.shards import write_shards
    from llama_nb.data.tokenizer import Tokenizer
    tokenizer = Tokenizer(corpus/'tokenizer.model')
    whole = write_shards(docs, tokenizer, folder/'whole', 2**30)
    cut = write_shards(docs, tokenizer, folder/'cut', whole.n_tokens//4000)
    loaders = {len(shards.manifest['shards']): Loader(shards, 2048, 8) for shards in (whole, cut)}
    def batches(found):
        for i in range(200): found.batch(i)
    work = {n: lambda found=found: batches(found) for n, found in loaders.items()}
    return list(contest(work, 200*8*2048/1e6).items())

# --- memory ---------------------------------------------------------------------------------------

WORK = {'data (tokenise)': '''
from llama_nb.data.tokenizer import Tokenizer
from llama_nb.data.tokenize import tokenise
tokenise(sys.argv[1], Tokenizer(sys.argv[3]), sys.argv[2], workers=1)''',
        'data clean documents (exact and near duplicates)': '''
from llama_nb.data.corpus import clean_source
from llama_nb.data.pipeline import find_files
clean_source('documents', find_files('documents', [sys.argv[1]]), sys.argv[2])''',
        'data clean c4': '''
from llama_nb.data.corpus import clean_source
from llama_nb.data.pipeline import find_files
clean_source('c4', find_files('c4', [sys.argv[1]]), sys.argv[2])'''}

# `ru_maxrss` of a process counts what its parent had when it was made; so of itself, the kernel's other count
PEAK = '''
import re, resource
print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1],
      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'''

def grown(docs, megabytes:int, path:Path):
    "Documents until they are so many MB, each different from all others"
    from dataclasses import replace
    from llama_nb.data.documents import write_jsonl
    def endless():
        left, turn = megabytes*1e6, 0
        while left > 0:
            for doc in docs:
                text = doc.text if not turn else doc.text.replace(' ', f' {turn}', 1 + len(doc.text)//50)
                left -= len(text)
                yield replace(doc, text=text, id=f'{turn}-{doc.id}')
                if left <= 0: return
            turn += 1
    write_jsonl(endless(), path)

def memories(docs, corpus:Path, folder:Path, sizes=(3, 30, 300))->list[tuple]: # what, [MB at each size]
    rows = {name: [] for name in WORK}
    for megabytes in sizes:
        path = folder/f'{megabytes}.jsonl'
        grown(docs, megabytes, path)
        for name, code in WORK.items():
            with tempfile.TemporaryDirectory(dir=folder) as out:
                command = [sys.executable, '-c', 'import sys' + code + PEAK, str(path), out,
                           str(corpus/'tokenizer.model')]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode: raise SystemExit(done.stderr[-2000:])
            rows[name].append(max(map(int, done.stdout.split()[-2:]))/1e3)
            print(name, megabytes, rows[name][-1], flush=True)
    return [(name, sizes, found) for name, found in rows.items()]

# --- the table ------------------------------------------------------------------------------------

def render(about, raw, beside, tokens, memory)->str:
    lines = [f'# Data: speed and memory\n\n{about}\n',
             'From raw to clean, all stages and passes, MB of unpacked files (of ArXiv: of packed papers):\n',
             '| source | MB raw, unpacked | MB per second |', '|---|---|---|']
    lines += [f'| {name} | {megabytes:.2f} | {rate:.2f} |' for name, megabytes, rate in raw]
    lines += ['\nStages that others have, on the same clean documents, MB per second:\n',
              '| stage | llama_nb | the other | which |', '|---|---|---|---|']
    for name, rates in beside:
        (_, ours), (who, theirs) = rates.items()
        lines.append(f'| {name} | {ours:.1f} | {theirs:.1f} | {who} |')
    lines += ['\nThe loader, sequences of 2,048, the same tokens in one file and in many:\n',
              '| files | million tokens per second |', '|---|---|']
    lines += [f'| {n:,} | {rate:.1f} |' for n, rate in tokens]
    lines.append('')
    lines += ['Largest resident set of a process, MB, for so many MB of text:\n',
              '| command | ' + ' | '.join(str(n) for n in memory[0][1]) + ' |', '|---|---|---|---|']
    lines += [f'| {name} | ' + ' | '.join(f'{m:,.0f}' for m in found) + ' |' for name, _, found in memory]
    return '\n'.join(lines) + '\n'

def main(corpus:Path, name:str='data'):
    from train_step import cpu_name
    from llama_nb.data.pipeline import SOURCES
    from llama_nb.data.mini import clean_documents
    docs = [d for source in SOURCES for d in clean_documents(corpus, source)]
    print(f'{len(docs)} documents, {size(docs):.1f} MB', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        raw, beside = sources(corpus), stages(docs, corpus, Path(folder))
        tokens, memory = loader(docs, corpus, Path(folder)), memories(docs, corpus, Path(folder))
    about = (f'Measured {time.strftime("%Y-%m-%d")} on {cpu_name()}, one thread, '
             f'Python {platform.python_version()}, datatrove {version("datatrove")}, '
             f'tokenizers {version("tokenizers")}, by `python benchmarks/data.py` on the corpus of '
             f'`llama-nb data mini`: {len(docs):,} clean documents, {size(docs):.1f} MB. Medians of {TURNS} '
             'turns (sources 3), processor time.')
    (HERE/f'{name}.md').write_text(render(about, raw, beside, tokens, memory))

if __name__ == '__main__': main(Path(sys.argv[1]), *sys.argv[2:])
