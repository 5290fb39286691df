"Sphinx configuration of the site. `make docs` makes the pages from the notebooks (tools/docs.py) and then runs this."
from configparser import ConfigParser
from importlib.metadata import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

# --- what it is -----------------------------------------------------------------------------------

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
language = 'en'
root_doc = 'index'

# --- how a page is read ---------------------------------------------------------------------------

extensions = ['myst_nb', 'sphinx.ext.mathjax', 'sphinx_copybutton']
nb_execution_mode = 'off'        # the outputs are those in the notebooks
nb_ipywidgets_js = {}            # else pages with widgets would ask other hosts for their scripts
nb_merge_streams = True
nb_mime_priority_overrides = [('html', 'image/svg+xml', 5)]
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist']
myst_heading_anchors = 4
add_module_names = False
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = 'hide'

# Formulas are set by one file, which comes with a package: a reader needs no network
mathjax_file = next(f for f in files('sphinx-mathjax-offline') if f.name == 'tex-svg.js').locate()
mathjax_path = mathjax_file.name
mathjax3_config = {'options': {'enableMenu': False}}     # the menu's entries would load files that are not there

# --- how it looks ---------------------------------------------------------------------------------

html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['static', str(mathjax_file)]
html_css_files = ['site.css']
html_copy_source = False
html_theme_options = {
    'repository_url': settings['git_url'],
    'repository_branch': settings['branch'],
    'path_to_docs': settings['nbs_path'],
    'use_repository_button': True,
    'use_source_button': True,
    'use_download_button': False,
    'launch_buttons': {'colab_url': 'https://colab.research.google.com', 'notebook_interface': 'jupyterlab'},
    'show_toc_level': 2,
}

def setup(app): return {'parallel_read_safe': True, 'parallel_write_safe': True}
