"Sphinx configuration of the site; `make docs` makes its pages from the notebooks first (tools/docs.py)."
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
smartquotes_action = 'qe'        # quotes and ellipses; two hyphens stay two hyphens, as in --help
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
mathjax3_config = {'options': {'enableMenu': False}}     # its entries would load files that are not there

# --- how it looks ---------------------------------------------------------------------------------

html_theme = 'sphinx_book_theme'
html_title = project
html_static_path = ['static', str(mathjax_file)]
html_css_files = ['site.css']
html_copy_source = False
html_theme_options = {
    'show_toc_level': 2,
    'max_navbar_depth': 2,            # parts, pages; modules below the index
    'collapse_navbar': True,          # the modules only where one reads of them
    'navbar_persistent': [],          # the search is in the side bar
    'use_download_button': False,
}

# --- where a page comes from ----------------------------------------------------------------------

repository = settings['git_url']
here = f"blob/{settings['branch']}"
colab = repository.replace('https://github.com', 'https://colab.research.google.com/github')

def button(url:str, icon:str, words:str)->dict:
    label = words.lower().replace(' ', '-')
    return {'type': 'link', 'url': url, 'icon': icon, 'tooltip': words, 'text': '', 'label': label}

def source_buttons(name:str)->list: # of the page `name`
    "A notebook on GitHub and Colab, a module on GitHub, else the repository"
    notebook = f"{settings['nbs_path']}/{name}.ipynb"
    module = name.removeprefix('api/').replace('.', '/') + '.py'
    if (ROOT/notebook).exists():
        return [button(f'{repository}/{here}/{notebook}', 'fab fa-github', 'Open the notebook on GitHub'),
                button(f'{colab}/{here}/{notebook}', 'fas fa-rocket', 'Open the notebook in Colab')]
    if (ROOT/module).exists():
        return [button(f'{repository}/{here}/{module}', 'fab fa-github', 'Open the module on GitHub')]
    return [button(repository, 'fab fa-github', 'Open the repository on GitHub')]

def add_to_page(app, pagename, templatename, context, doctree):
    context['header_buttons'] = [*source_buttons(pagename), *context['header_buttons']]
    if pagename == root_doc: context['title'] = settings['description']     # else its name is there twice

def setup(app):
    app.connect('html-page-context', add_to_page, priority=900)     # after the theme has made its buttons
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
