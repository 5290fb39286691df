"The pictures: fresh, complete, true to the model, and legible in light and dark as far as can be computed."
import json, re, shutil, tomllib
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path
import pytest
from conftest import load_tool
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
PARTS = sorted({path.name[0] for path in NBS.glob('[0-9]*.ipynb')})
NAMES = ['architecture.svg', 'map.svg', 'overview.svg', *(f'part-{part}.svg' for part in PARTS)]
SVG = '{http://www.w3.org/2000/svg}'

@cache
def drawn(): return load_tool('pictures').draw()

# --- they are what the script draws, and small ------------------------------------------------------

def test_the_committed_pictures_are_fresh():
    there = {p.name: p.read_text(encoding='utf-8') for p in sorted((NBS/'images').iterdir())}
    stale = [name for name in drawn().keys() | there.keys() if drawn().get(name) != there.get(name)]
    assert stale == [], 'run `make prepare` and commit the result'
    assert sorted(there) == NAMES

@pytest.mark.parametrize('name', NAMES)
def test_a_picture_is_small_and_asks_for_nothing(name):
    text = drawn()[name]
    assert len(text.encode()) < 60_000
    assert not re.search(r'<(script|image|foreignObject|use)\b|url\(|href', text)
    assert ET.fromstring(text).findtext(f'{SVG}desc')

# --- they name the pages that exist, and the map all of them ----------------------------------------

def words(svg): return [t.text for t in ET.fromstring(svg).iter(f'{SVG}text')]

def pages_of(nbs): return {p.stem.split('_')[0] for p in nbs.glob('[0-9]*.ipynb')}

def pages_on_map(svg): return [w for w in words(svg) if re.fullmatch(r'\d[0-9A-Z]', w)]

def test_the_map_has_every_page_once():
    assert sorted(pages_on_map(drawn()['map.svg'])) == sorted(pages_of(NBS))

@pytest.mark.parametrize('part', PARTS)
def test_the_map_of_a_part_has_its_pages(part):
    pages = sorted(page for page in pages_of(NBS) if page.startswith(part))
    assert pages_on_map(drawn()[f'part-{part}.svg']) == pages

@pytest.mark.parametrize('part', PARTS)
def test_a_part_begins_with_its_map(part):
    "After the title of its first page, and nowhere else"
    pages = sorted(NBS.glob(f'{part}*.ipynb'))
    cells = [json.loads(page.read_text(encoding='utf-8'))['cells'] for page in pages]
    shown = [(page.stem, i) for page, of_page in zip(pages, cells) for i, cell in enumerate(of_page)
             if f'](images/part-{part}.svg)' in ''.join(cell['source'])]
    assert shown == [(pages[0].stem, 2)]

def test_the_overview_names_pages_that_exist():
    named = [w.replace(' ', '_') for w in words(drawn()['overview.svg']) if re.fullmatch(r'\d\d [\w.]+', w)]
    assert len(named) >= 8 and [n for n in named if not (NBS/f'{n}.ipynb').exists()] == []

def test_a_new_page_changes_the_map_and_a_lost_one_is_missed(tmp_path):
    nbs = tmp_path/'nbs'
    shutil.copytree(NBS, nbs, ignore=shutil.ignore_patterns('images'))
    cell = {'cell_type': 'markdown', 'source': ['# Proof']}
    (nbs/'7Z_data.proof.ipynb').write_text(json.dumps({'cells': [cell]}))
    svg = load_tool('pictures').draw(nbs)['map.svg']
    assert set(pages_on_map(svg)) - pages_of(NBS) == {'7Z'} and 'Proof' in words(svg)
    next(nbs.glob('*_train.loss.ipynb')).unlink()
    with pytest.raises(SystemExit, match='names train.loss, and no page'): load_tool('pictures').draw(nbs)

def test_titles_of_any_length_fit(tmp_path):
    nbs = tmp_path/'nbs'
    shutil.copytree(NBS, nbs, ignore=shutil.ignore_patterns('images'))
    title = '# ' + 'Several words of a title that never ends '*3 + ': and more'
    cell = {'cell_type': 'markdown', 'source': [title]}
    (nbs/'73_data.long.ipynb').write_text(json.dumps({'cells': [cell]}))
    assert faults(load_tool('pictures').draw(nbs)['map.svg']) == []

def test_the_parts_are_those_of_the_site():
    named = tomllib.loads((ROOT/'docs'/'parts.toml').read_text(encoding='utf-8'))
    assert named == {str(number): part.name for number, part in load_tool('pictures').PARTS.items()}

# --- words fit into their boxes, and nothing runs through them --------------------------------------

def numbers(element, *names): return [float(element.get(n, 0)) for n in names]

def extent(text):
    "(left, top, right, bottom) of a text in DejaVu, by matplotlib's layout"
    mono = 'mono' in text.get('class').split()
    x, y, size = numbers(text, 'x', 'y', 'font-size')
    font = FontProperties(family='DejaVu Sans Mono' if mono else 'DejaVu Sans', size=size,
                          weight=text.get('font-weight', 'normal'))
    width, height, descent = text_to_path.get_text_width_height_descent(text.text, font, ismath=False)
    left = x - width*{None: 0, 'middle': 0.5, 'end': 1}[text.get('text-anchor')]
    return left, y - height + descent, left + width, y + descent

def rectangle(rect):
    x, y, w, h = numbers(rect, 'x', 'y', 'width', 'height')
    return x, y, x + w, y + h

def inside(a, b, margin=0):
    "Is box `a` in box `b`, with a margin to the left and to the right?"
    return a[0] >= b[0] + margin and a[2] <= b[2] - margin and a[1] >= b[1] and a[3] <= b[3]

def meet(a, b): return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

def ground_of(text, elements):
    "The box on which a text stands: the last one drawn before it that holds its middle"
    left, top, right, bottom = extent(text)
    middle = ((left + right)/2, (top + bottom)/2)*2
    before = elements[:elements.index(text)]
    return [e for e in before if e.tag == f'{SVG}rect' and inside(middle, rectangle(e))][-1]

def strokes(elements):
    "A box around each straight piece of the lines; curves at corners are taken as their chords"
    for e in elements:
        if e.tag != f'{SVG}path' or not {'line', 'spine'} & set(e.get('class').split()): continue
        flat = [float(n) for n in re.findall(r'-?[\d.]+', e.get('d'))]
        points = list(zip(flat[::2], flat[1::2]))
        for (ax, ay), (bx, by) in zip(points, points[1:]):
            yield min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1

def faults(svg):
    "What is wrong with the words of a picture"
    elements = list(ET.fromstring(svg))
    texts = [e for e in elements if e.tag == f'{SVG}text']
    boxes = [extent(text) for text in texts]
    found = []
    for i, (text, box) in enumerate(zip(texts, boxes)):
        ground = ground_of(text, elements)
        if not inside(box, rectangle(ground), 5): found.append(f'{text.text!r} leaves its box')
        found += [f'{text.text!r} on {t.text!r}' for t, other in zip(texts[:i], boxes) if meet(box, other)]
        lines = strokes(elements[elements.index(ground):])
        found += [f'a line through {text.text!r}' for piece in lines if meet(box, piece)]
        later = [e for e in elements[elements.index(text):] if e.tag == f'{SVG}rect']
        found += [f'{text.text!r} is covered' for e in later if meet(box, rectangle(e))]
    return found

@pytest.mark.parametrize('name', NAMES)
def test_words_fit(name): assert faults(drawn()[name]) == []

@pytest.mark.parametrize('old, new, fault', [
    ('>Checkpoint<', '>Checkpoint and much more<', 'leaves its box'),
    ('x="28" y="76"', 'x="28" y="97"', ' on '),
    ('<text x="28" y="76"', '<path d="M28 70L60 70" class="line"/><text x="28" y="76"', 'a line through'),
    ('</svg>', '<rect x="20" y="60" width="50" height="20" class="card"/></svg>', 'is covered')])
def test_words_that_do_not_fit_are_seen(old, new, fault):
    svg = drawn()['overview.svg']
    assert old in svg
    assert any(fault in found for found in faults(svg.replace(old, new, 1)))

@pytest.mark.parametrize('name', NAMES)
def test_no_word_is_small(name):
    root = ET.fromstring(drawn()[name])
    smallest = min(float(t.get('font-size')) for t in root.iter(f'{SVG}text'))
    assert smallest/float(root.get('width')) >= 13/720   # six and a half pixels on a phone of 360

# --- light and dark ---------------------------------------------------------------------------------

def sheets(svg):
    "{class: {property: colour}} of the light scheme and of the dark one"
    light, dark = ET.fromstring(svg).findtext(f'{SVG}style').split('@media (prefers-color-scheme:dark)')
    return [parsed(light), parsed(dark)]

def parsed(sheet):
    found = {}
    for names, body in re.findall(r'([.\w,]+)\{([^{}]*)\}', sheet):
        for name in names.split(','):
            pairs = (line.split(':') for line in body.split(';'))
            found.setdefault(name.lstrip('.'), {}).update({k: v for k, v in pairs if v.startswith('#')})
    return found

def luminance(colour):
    "Relative luminance of WCAG 2"
    channels = [int(colour[i:i + 2], 16)/255 for i in (1, 3, 5)]
    linear = [c/12.92 if c <= 0.04045 else ((c + 0.055)/1.055)**2.4 for c in channels]
    return sum(w*c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

def contrast(a, b):
    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05)/(dim + 0.05)

def test_contrast_of_black_and_white(): assert contrast('#ffffff', '#000000') == pytest.approx(21)

def colour(element, sheet, name):
    values = [sheet[c][name] for c in element.get('class').split() if name in sheet.get(c, {})]
    return values[-1] if values else None

@pytest.mark.parametrize('scheme', [0, 1], ids=['light', 'dark'])
@pytest.mark.parametrize('name', NAMES)
def test_contrast(name, scheme):
    "WCAG 2 AA: 4.5 for words on their box, 3 for lines and borders on the ground of the picture"
    svg = drawn()[name]
    sheet, elements = sheets(svg)[scheme], list(ET.fromstring(svg))
    for e in elements:
        if e.tag == f'{SVG}text':
            ground = colour(ground_of(e, elements), sheet, 'fill')
            assert contrast(colour(e, sheet, 'fill'), ground) >= 4.5, e.text
        stroke = colour(e, sheet, 'stroke') if e.get('class') else None
        if stroke: assert contrast(stroke, sheet['card']['fill']) >= 3, ET.tostring(e)

def test_both_schemes_have_the_same_rules():
    light, dark = sheets(drawn()['map.svg'])
    assert light.keys() - dark.keys() <= {'text', 'mono', 'icon', 'spine'} and dark.keys() <= light.keys()

# --- the architecture is that of the model ----------------------------------------------------------

def test_weights_have_the_names_and_shapes_of_the_model():
    from llama_nb.config import ModelConfig
    from llama_nb.model.transformer import LLaMA
    config = ModelConfig(24, 2, 3, vocab_size=101, multiple_of=4, max_seq_len=16)
    size = {'d': 24, 'hk': 3*config.head_dim, 'f': config.ffn_dim, 'v': 101}
    assert config.ffn_dim not in (24, 101)
    state = {name.split('.')[-2]: tuple(p.shape) for name, p in LLaMA(config).state_dict().items()}
    weights = load_tool('pictures').WEIGHTS
    drawn_as = {name: tuple(size[a] for a in letters.split()) for name, letters in weights.items()}
    assert state == drawn_as
    shown = words(drawn()['architecture.svg'])
    assert [name for name in state if shown.count(name) != 1] == []

def test_the_sizes_of_7B_are_those_of_the_preset():
    from llama_nb.config import PRESETS
    c = PRESETS['7B']
    preset = {'d': c.dim, 'h': c.n_heads, 'k': c.head_dim, 'f': c.ffn_dim, 'v': c.vocab_size, 'L': c.n_layers}
    assert load_tool('pictures').SIZES == preset

# --- they are shown ---------------------------------------------------------------------------------

IMAGE = re.compile(r'!\[([^\]]+)\]\(([^)]*\.svg)\)')

def shown_in(path):
    "{picture: words instead of it} of a page"
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb': text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'])
    return {(path.parent/link).resolve(): words for words, link in IMAGE.findall(text)}

def test_every_picture_is_shown_and_every_link_leads_to_one():
    pages = [*NBS.glob('*.ipynb'), ROOT/'README.md']
    shown = [shown_in(page) for page in pages]
    assert set().union(*shown) == {(NBS/'images'/name).resolve() for name in NAMES}
    assert set(shown_in(NBS/'index.ipynb')) == set(shown_in(ROOT/'README.md'))
    assert all(len(words) > 20 for page in shown for words in page.values())
