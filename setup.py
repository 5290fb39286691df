"Packaging: every fact comes from settings.ini, so there is one place to change it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = here/'README.md'

# xformers has wheels for this machine only; they ask for CUDA 12's runtime, which a torch for CUDA 13 has not
linux_x86 = [f'{r}; sys_platform == "linux" and platform_machine == "x86_64"'
             for r in cfg['linux_x86_requirements'].split()]

# What some of the seven sources need
data = cfg['data_requirements'].split()

# Parquet files as a source of text: 50 MB, so it is no part of `data`
parquet = cfg['parquet_requirements'].split()

# A tokenizer.json in the place of a SentencePiece model
huggingface = cfg['huggingface_requirements'].split()

# A model as one file for llama.cpp
gguf = cfg['gguf_requirements'].split()

# Cleaning under Slurm or Ray, and from addresses
cluster = data + cfg['cluster_requirements'].split()

# For runs that are watched at Weights & Biases
wandb = cfg['wandb_requirements'].split()

# The site is part of `test`, so that a link or a formula that breaks is seen; `dev` is for who edits pages
docs = cfg['docs_requirements'].split()
test = cfg['test_requirements'].split() + docs + data + parquet + huggingface + gguf + wandb
dev = cfg['dev_requirements'].split() + test

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    package_dir={'': '.'},   # `pip install -e .` then writes a path, which editors and type checkers follow
    package_data={cfg['lib_name']: ['py.typed']},
    install_requires=cfg['requirements'].split() + linux_x86,
    extras_require={'dev': dev, 'test': test, 'docs': docs, 'data': data, 'parquet': parquet,
                    'huggingface': huggingface, 'gguf': gguf, 'cluster': cluster, 'wandb': wandb},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
