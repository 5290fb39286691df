"""Cleaners that others wrote beside ours, on the raw files of the mini corpus.

    git clone -b rp_v1 https://github.com/togethercomputer/RedPajama-Data    # Apache-2.0
    pip install -e '.[data]' beautifulsoup4 datatrove orjson spacy 'xxhash<4'
    llama-nb data mini runs/mini
    python benchmarks/cleaners.py RedPajama-Data runs/mini

For three sources RedPajama's first release has functions from a text to a text: ArXiv, GitHub (headers) and
Stack Exchange; datatrove has the rules of C4 as its article gives them. Each runs unchanged, on the texts
that our reader gives; ours runs with the settings that promise the same, and with the preset `paper`. One
process, one thread; turns in a changing order, medians of processor time, in MB (10^6 bytes) of input a
second. The table goes into cleaners.md.
"""
import contextlib, importlib, io, json, os, platform, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from data import contest

# --- theirs -----------------------------------------------------------------------------------------

def module_of(folder:Path, source:str, name:str):
    "A program of theirs as a module. While imported they read flags, folders and a model of languages"
    classes = SimpleNamespace(eprint=None, _FastText=object)
    sys.modules['fasttext'] = SimpleNamespace(FastText=classes, load_model=lambda *a, **k: None)
    here = str(folder/'data_prep'/source)
    arguments, sys.argv = sys.argv, sys.argv[:1]
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.argv = arguments
        sys.path.remove(here)
        for word in ('fasttext', 'utils'): sys.modules.pop(word, None)

def arxiv_of(folder:Path):
    from llama_nb.data.arxiv import _files
    theirs = module_of(folder, 'arxiv', 'arxiv_cleaner')
    def clean(doc):
        encodings = {encoding for _, _, encoding in doc.metadata['files']}
        if encodings != {'utf-8'}: return ''                        # they read no other
        return theirs.clean_tex_files([*_files(doc).values()])
    return clean

def github_of(folder:Path):
    theirs = module_of(folder, 'github', 'github_clean_dedup_local')
    return lambda doc: theirs.clean_copyright_comments(doc.text)

def stackexchange_of(folder:Path):
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty)/'qa_pairs').mkdir()
        os.environ['LEMMA_DATA_DIR_SE'] = os.environ['LEMMA_DATA_DIR_SE_OUT'] = empty
        theirs = module_of(folder, 'stack_exchange', 'post_processing')
    theirs.lang_id = SimpleNamespace(predict_lang=lambda text: 'en')
    def clean(doc):
        question, *answers = map(json.loads, doc.text.split('\n'))
        pair = {'question': {'id': '', 'text': f'{question.get("Title", "")} {question["Body"]}',
                             'score': question.get('Score')}}
        if answers: pair['answers'] = [{'text': a['Body'], 'score': str(a.get('Score', 0))} for a in answers]
        return theirs.process_qa_pair(pair)['text']
    return clean

def c4_of(_):
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter
    rules = C4QualityFilter()
    def clean(doc):
        copy = Document(text=doc.text, id=doc.id)
        return copy.text if rules.filter(copy) is True else ''
    return clean

# --- ours -------------------------------------------------------------------------------------------

ARTICLE = {'min_words': 3, 'min_sentences': 5, 'end_marks': '.?!"\''}      # as datatrove reads it

def ours(source:str, name:str):
    from llama_nb.data import arxiv, c4, github, stackexchange
    from llama_nb.data.stage import preset
    rules, clean = {'arxiv': (arxiv.ArxivRules, arxiv.clean_arxiv),
                    'stackexchange': (stackexchange.StackexchangeRules, stackexchange.clean_stackexchange),
                    'c4': (c4.C4Rules, c4.clean_c4), 'github': (github.GithubRules, None)}[source]
    rules = rules(**ARTICLE) if name == 'article' else preset(rules, name)
    if source == 'github': return lambda doc: github.HEADERS[rules.header](doc.text, doc.metadata['path'])
    def text_of(doc):
        found, _ = clean(doc, rules)
        return found.text if found else ''
    return text_of

def documents(corpus:Path, source:str)->list:
    from llama_nb.data import arxiv, documents, github, stackexchange
    from llama_nb.data.pipeline import find_files
    from llama_nb.data.stage import Tally
    read = {'arxiv': arxiv.read_arxiv, 'c4': documents.read_jsonl, 'github': github.read_project,
            'stackexchange': stackexchange.read_stackexchange}[source]
    paths = find_files(source, [corpus/'raw'/source]).values()
    return [doc for path in paths for doc in read(path, Tally().problem)]

# --- the comparison ---------------------------------------------------------------------------------

# whose, how, and which settings of ours promise the same
SOURCES = {'arxiv': ('RedPajama', arxiv_of, 'redpajama'), 'c4': ('datatrove', c4_of, 'article'),
           'github': ('RedPajama', github_of, 'redpajama'),
           'stackexchange': ('RedPajama', stackexchange_of, 'redpajama')}

def same(a:str, b:str)->bool: return a.strip() == b.strip()         # a document of ours ends in one new line

def compare(folder:Path, corpus:Path, source:str)->dict:
    docs, (who, theirs, settings) = documents(corpus, source), SOURCES[source]
    cleaners = {who: theirs(folder), f'llama_nb, {settings}': ours(source, settings),
                'llama_nb, paper': ours(source, 'paper')}
    def run(clean): return lambda: [clean(doc) for doc in docs]
    texts = {name: run(clean)() for name, clean in cleaners.items()}
    megabytes = sum(len(doc.text.encode()) for doc in docs)/1e6
    with contextlib.redirect_stdout(io.StringIO()):                 # they print a line for each
        speed = contest({name: run(clean) for name, clean in cleaners.items()}, megabytes, 5)
    first, second, _ = texts.values()
    differ = [doc.id for doc, a, b in zip(docs, first, second) if not same(a, b)]
    print(source, len(docs), 'differ:', differ[:5])
    return {'source': source, 'documents': len(docs), 'megabytes': megabytes, 'differ': len(differ),
            'rows': [(name, sum(bool(t.strip()) for t in found), sum(len(t.encode()) for t in found)/1e6,
                      speed[name]) for name, found in texts.items()]}

def render(about:str, found:list[dict])->str:
    lines = [f'# Cleaners of others beside ours\n\n{about}\n',
             '| source | cleaner | documents in | kept | MB in | MB out | MB per second |',
             '|---|---|---|---|---|---|---|']
    for each in found:
        given = f'{each["documents"]:,}'
        lines += [f'| {each["source"]} | {name} | {given} | {kept:,} | {each["megabytes"]:.2f} | {out:.2f} | '
                  f'{rate:.2f} |' for name, kept, out, rate in each['rows']]
    differ = ', '.join(f'{each["differ"]} of {each["documents"]:,} ({each["source"]})' for each in found)
    lines.append('\nTexts in which the other and our settings that promise the same differ, but for white '
                 f'space at the ends: {differ}.')
    return '\n'.join(lines) + '\n'

def main(folder:Path, corpus:Path):
    from train_step import cpu_name
    found = [compare(folder, corpus, source) for source in SOURCES]
    about = (f'Measured {time.strftime("%Y-%m-%d")} on {cpu_name()}, one thread, Python '
             f'{platform.python_version()}, datatrove {version("datatrove")}, by '
             '`python benchmarks/cleaners.py` on the raw files of `llama-nb data mini`; medians of 5 turns, '
             'processor time.')
    (HERE/'cleaners.md').write_text(render(about, found))

if __name__ == '__main__': main(*map(Path, sys.argv[1:3]))
