"""Draw nbs/images/*.svg: pipeline, architecture, map of the pages, map of each part; --check only compares.

Each picture carries its light and its dark colours, and its own ground: it can be read on a page of either
kind, even where a reader has switched the page and the system is of the other kind.
"""
import functools, sys, tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from fontTools.ttLib import TTFont
from matplotlib import get_data_path
from readme import title

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT/'nbs'/'images'

# --- colours: (light, dark) of every kind of shape and word -----------------------------------------

CARD, INK, DIM = ('#ffffff', '#0d1117'), ('#1f2328', '#e6edf3'), ('#57606a', '#9da7b3')
HUES = {0: (('#eef1f4', '#21262d'), ('#6e7781', '#8b949e')),   # part: (inside, border)
        1: (('#e4f5eb', '#10291c'), ('#1a7f4b', '#3fb57a')),
        2: (('#e4effc', '#0f2644'), ('#0b62c4', '#58a6ff')),
        3: (('#fdeedc', '#36230d'), ('#b35900', '#e8963f')),
        4: (('#efeafc', '#271c47'), ('#6b46c1', '#a78bfa')),
        5: (('#fce8f1', '#3a1327'), ('#b8246a', '#f47cb0')),
        6: (('#fbe8e5', '#3b1814'), ('#b3392a', '#f0806f')),
        7: (('#f3f3da', '#2b2b0c'), ('#6f7300', '#c4c843')),
        8: (('#dcf3f5', '#0a2b2f'), ('#0d7680', '#4fc3cf')),
        9: (('#eef1f4', '#21262d'), ('#6e7781', '#8b949e'))}

def rules(scheme):
    "The style sheet of one scheme: 0 light, 1 dark"
    fill = {'card': CARD, 'ink': INK, 'dim': DIM, 'head': DIM, 'panel': ('#f6f8fa', '#151b23')}
    lines = [f'.{name}{{fill:{colour[scheme]}}}' for name, colour in fill.items()]
    lines.append(f'.line,.dash{{stroke:{DIM[scheme]}}}')
    lines.append(f'.bare{{fill:{CARD[scheme]};stroke:{DIM[scheme]}}}')
    for part, (inside, border) in HUES.items():
        lines.append(f'.p{part}{{fill:{inside[scheme]};stroke:{border[scheme]}}}')
        lines.append(f'.c{part}{{fill:{CARD[scheme]};stroke:{border[scheme]}}}')
        lines.append(f'.s{part}{{stroke:{border[scheme]}}}.f{part}{{fill:{border[scheme]}}}')
    return ''.join(lines)

FIXED = ('text{font-family:system-ui,sans-serif}.mono{font-family:ui-monospace,monospace}'
         '.line,.dash,.icon,.spine{fill:none;stroke-linecap:round;stroke-linejoin:round}'
         '.line,.icon,.bare{stroke-width:2}.dash{stroke-width:1.5;stroke-dasharray:2 5}'
         '.spine{stroke-width:6}')

# --- words: how wide they are -----------------------------------------------------------------------

FACES = {'sans': 'DejaVuSans', 'bold': 'DejaVuSans-Bold', 'mono': 'DejaVuSansMono',
         'monobold': 'DejaVuSansMono-Bold'}

@functools.cache
def face(name):
    "Widths of all characters of a font, in units of its size"
    font = TTFont(f'{get_data_path()}/fonts/ttf/{FACES[name]}.ttf')
    widths, glyphs = font['hmtx'].metrics, font.getBestCmap()
    return {chr(code): widths[glyph][0]/font['head'].unitsPerEm for code, glyph in glyphs.items()}

def width_of(words, size, font='sans'):
    "Pixels in DejaVu, which is wider than what most systems take for sans-serif"
    return sum(face(font).get(c, 1) for c in words)*size   # 1: more than any letter but the widest

def wrap(words, room, size, font='sans'):
    "Lines none of which is wider than `room`"
    lines = ['']
    for word in words.split():
        longer = f'{lines[-1]} {word}'.strip()
        fits = width_of(longer, size, font) <= room
        lines[-1 if fits else len(lines):] = [longer if fits else word]
    return [line for line in lines if line]

# --- shapes -----------------------------------------------------------------------------------------

def number(x): return f'{x:.1f}'.rstrip('0').rstrip('.')

def rounded(points, radius=8):
    "A path through the points whose corners are round; they meet at right angles"
    steps = [f'M{number(points[0][0])} {number(points[0][1])}']
    for before, (x, y), after in zip(points, points[1:], points[2:]):
        (ax, ay), (bx, by) = (toward((x, y), p, radius) for p in (before, after))
        steps.append(f'L{number(ax)} {number(ay)}Q{number(x)} {number(y)} {number(bx)} {number(by)}')
    return ''.join(steps) + f'L{number(points[-1][0])} {number(points[-1][1])}'

def toward(a, b, distance):
    "The point at a distance from `a` on the way to `b`"
    length = max(abs(b[0] - a[0]) + abs(b[1] - a[1]), 1e-9)
    share = min(distance/length, 0.5)
    return a[0] + (b[0] - a[0])*share, a[1] + (b[1] - a[1])*share

class Picture:
    "Shapes and words, later on top of earlier; its own ground, so that it can be read on any page"
    def __init__(self, width, height, title, description):
        self.size, self.title, self.description, self.body = (width, height), title, description, []

    def put(self, tag, content=None, **attributes):
        pairs = {name.rstrip('_').replace('_', '-'): value for name, value in attributes.items()}
        text = ''.join(f' {k}="{v if isinstance(v, str) else number(v)}"' for k, v in pairs.items())
        self.body.append(f'<{tag}{text}/>' if content is None else f'<{tag}{text}>{escape(content)}</{tag}>')

    def box(self, x, y, w, h, kind, radius=10, dashed=False):
        dash = {'stroke_dasharray': '5 5'} if dashed else {}
        self.put('rect', x=x, y=y, width=w, height=h, rx=radius, class_=kind, **dash)

    def text(self, x, y, words, size=15, kind='ink', font='sans', anchor='start'):
        names = f'{kind} mono' if 'mono' in font else kind
        extra = {'font_weight': 'bold'} if 'bold' in font else {}
        extra |= {'text_anchor': anchor} if anchor != 'start' else {}
        self.put('text', words, x=x, y=y, font_size=size, class_=names, **extra)

    def line(self, *points, kind='line'): self.put('path', d=rounded(points), class_=kind)

    def arrow(self, *points, kind='line', head='head', size=6):
        "A line that ends in a triangle"
        tip, back = points[-1], toward(points[-1], points[-2], 1.6*size)
        self.line(*points[:-1], back, kind=kind)
        dx, dy = (tip[1] - back[1])/1.6, (tip[0] - back[0])/1.6
        corners = [tip, (back[0] - dx, back[1] + dy), (back[0] + dx, back[1] - dy)]
        self.put('path', d='M' + 'L'.join(f'{number(x)} {number(y)}' for x, y in corners) + 'Z', class_=head)

    def icon(self, x, y, d, part):
        self.put('path', d=d, class_=f'icon s{part}', transform=f'translate({number(x)} {number(y)})')

    def sign(self, x, y, mark, kind):
        "A circle with + or x in it"
        self.put('circle', cx=x, cy=y, r=13, class_=kind, stroke_width=2)
        a, b = (7, 0) if mark == '+' else (5, 5)
        cross = ((x - a, y - b), (x + a, y + b)), ((x - b, y + a), (x + b, y - a))
        self.put('path', d=''.join(map(rounded, cross)), class_=f'icon {kind.replace("c", "s")}')

    def svg(self):
        width, height = self.size
        style = f'{FIXED}{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}'
        ground = f'<rect x="0" y="0" width="{width}" height="{height}" rx="12" class="card"/>'
        body = '\n'.join([ground, *self.body])
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img">\n<title>{escape(self.title)}</title>\n'
                f'<desc>{escape(self.description)}</desc>\n<style>{style}</style>\n{body}\n</svg>\n')

# --- the pages --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    name: str
    needs: tuple = ()

NAMES = tomllib.loads((ROOT/'docs'/'parts.toml').read_text(encoding='utf-8'))
NEEDS = {1: (0,), 2: (0,), 3: (1, 2), 4: (3,), 5: (3,), 6: (4, 5), 7: (1,), 8: (4, 5)}
PARTS = {int(number): Part(name, NEEDS.get(int(number), ())) for number, name in NAMES.items()}
TRACKS = {'the model in an afternoon': (0, 1, 2, 3), 'train it large': (4, 5, 6, 8),
          'generate with a LLaMA': (2, 3), 'the data': (1, 7)}

def pages(nbs):
    "{module: (number, title)} of all notebooks in reading order"
    found = {}
    for path in sorted(nbs.glob('[0-9]*.ipynb')):
        place, module = path.stem.split('_', 1)
        found[module] = place, title(path).replace('`', '')
    return found

def number_of(module, found):
    "The number of a module's page; an error if it has none"
    if module not in found: sys.exit(f'tools/pictures.py names {module}, and no page of nbs/ exports it')
    return found[module][0]

# --- 1: the pipeline --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Station:
    name: str
    part: int
    lines: tuple   # what happens there, one or two lines
    shape: str     # what comes out
    modules: tuple # one or two pages

STATIONS = [Station('Text', 1, ('documents: code,', 'books, web pages'), 'strings', ('data.documents',)),
            Station('Tokens', 1, ('frequent strings', 'become numbers < v'), '(t)',
                    ('data.tokenizer', 'data.shards')),
            Station('Batches', 1, ('b rows of t tokens,', 'in shuffled order'), '(b, t)', ('data.loader',)),
            Station('Model', 2, ('scores every possible', 'next token'), '(b, t, v)', ('model.transformer',)),
            Station('Loss', 3, ('how improbable was', 'what really came?'), 'one number', ('train.loss',)),
            Station('Step', 3, ('gradients and AdamW', 'move every weight'), 'new weights', ('train.optim',)),
            Station('Checkpoint', 6, ('weights, moments and', 'position, on disk'), 'files',
                    ('train.checkpoint',)),
            Station('Generation', 3, ('choose a next token,', 'append it, ask again'), 'strings',
                    ('infer.generate',))]
ICONS = {'Text': 'M2 3H38M2 12H38M2 21H38M2 30H22',   # 40 by 32 pixels
         'Tokens': 'M2 4H16V13H2ZM20 4H27V13H20ZM31 4H39V13H31ZM2 19H10V28H2ZM14 19H30V28H14Z'
                   'M34 19H39V28H34Z',
         'Batches': 'M1 2H39V30H1ZM1 11.3H39M1 20.6H39M10.5 2V30M20 2V30M29.5 2V30',
         'Model': 'M3 1H37V8H3ZM3 12.5H37V19.5H3ZM3 24H37V31H3ZM20 8V12.5M20 19.5V24',
         'Loss': 'M2 1V30H39M6 4C9 20 17 24 38 25',
         'Step': 'M1 2C8 36 32 36 39 2M7 5C9 14 11 19 16 22M10.5 21.5L16.5 22.4L16.5 16',
         'Checkpoint': 'M4 7C4 1 36 1 36 7S4 13 4 7V25C4 31 36 31 36 25V7M4 16C4 22 36 22 36 16',
         'Generation': 'M2 3H38M2 13H20M27 7V19M2 24H3M9 24H10M16 24H17M23 24H24M30 24H31',
         'Training loop': 'M33 9A15 15 0 1 0 35 18M34 1V9.5H25.5'}
LOOP = Station('Training loop', 6, ('then the next batch,', 'on 1 device or 2048'), '',
               ('train.trainer', 'parallel.mesh'))
RING = [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1)]   # column and row of each station
WIDE, HIGH, LEFT, GAP_X, GAP_Y = 206, 168, 14, 37, 42

def corner(column, row): return LEFT + column*(WIDE + GAP_X), LEFT + row*(HIGH + GAP_Y)

def station(pic, s, place, found, dashed=False):
    x, y = corner(*place)
    pic.box(x, y, WIDE, HIGH, f'c{s.part}' if dashed else f'p{s.part}', dashed=dashed)
    pic.text(x + 14, y + 32, s.name, 19, font='bold')
    pic.icon(x + WIDE - 54, y + (14 if s.shape else 94), ICONS[s.name], s.part)
    for i, line in enumerate(s.lines): pic.text(x + 14, y + 62 + 21*i, line, 15)
    if s.shape: pic.text(x + 14, y + 112, f'→ {s.shape}', 15, font='monobold')
    for i, module in enumerate(reversed(s.modules)):
        pic.text(x + 14, y + HIGH - 14 - 18*i, f'{number_of(module, found)} {module}', 13, 'dim', 'mono')

def between(pic, start, end, gap=5):
    "An arrow from one place of the ring to its neighbour"
    (ax, ay), (bx, by) = corner(*start), corner(*end)
    dx, dy = end[0] - start[0], end[1] - start[1]
    a = ax + WIDE/2 + dx*(WIDE/2 + gap), ay + HIGH/2 + dy*(HIGH/2 + gap)
    pic.arrow(a, (bx + WIDE/2 - dx*(WIDE/2 + gap), by + HIGH/2 - dy*(HIGH/2 + gap)))

def overview(found):
    places = dict(zip([s.name for s in STATIONS], RING))
    pic = Picture(720, 3*HIGH + 2*GAP_Y + 2*LEFT, 'The pipeline',
                  f'Stations in a ring: {", ".join(s.name.lower() for s in STATIONS)}. '
                  'From the step an arrow leads back to the batches: the training loop.')
    for s in STATIONS: station(pic, s, places[s.name], found)
    station(pic, LOOP, (1, 1), found, dashed=True)
    for start, end in zip(RING, RING[1:]): between(pic, start, end)   # samples do not become documents
    between(pic, places['Step'], (1, 1))
    (x, y), (right, top) = corner(1, 1), corner(*places['Batches'])
    lane, floor = x + WIDE + GAP_X/2, y - GAP_Y/2   # between the stations
    pic.arrow((x + WIDE + 5, y + HIGH/2), (lane, y + HIGH/2), (lane, floor), (right + 48, floor),
              (right + 48, top + HIGH + 5))
    return pic.svg()

# --- 2: the architecture ----------------------------------------------------------------------------

SIZES = {'d': 4096, 'h': 32, 'k': 128, 'f': 11008, 'v': 32000, 'L': 32}   # of 7B
# the axes of every parameter, by the last word of its name
WEIGHTS = {'tok_embeddings': 'v d', 'norm': 'd', 'output': 'v d', 'attention_norm': 'd', 'ffn_norm': 'd',
           'wq': 'hk d', 'wk': 'hk d', 'wv': 'hk d', 'wo': 'd hk', 'w1': 'f d', 'w2': 'd f', 'w3': 'f d'}
SPINE, MIDDLE = 262, 492   # x of the block's residual stream, and of what hangs on it
NORM, ATTEND, FEED, TABLE = 1, 2, 3, 0   # colours of parameters

def axes(letters):
    "'hk d' -> '(h·k, d)'"
    return '(' + ', '.join('·'.join(axis) for axis in letters.split()) + ')'

def weight(pic, name, x, y, w, h, part):
    "A box around a parameter: its name in the checkpoint and its shape; x is the middle"
    pic.box(x - w/2, y, w, h, f'p{part}', 8)
    if w > 200:   # in one line
        pic.text(x - w/2 + 16, y + h/2 + 5, name, 15, font='monobold')
        pic.text(x + w/2 - 16, y + h/2 + 5, axes(WEIGHTS[name]), 14, font='mono', anchor='end')
    else:
        pic.text(x, y + h/2 - 3, name, 15, font='monobold', anchor='middle')
        pic.text(x, y + h/2 + 15, axes(WEIGHTS[name]), 14, font='mono', anchor='middle')

def operation(pic, words, x, y, w, h):
    "A box around what has no weights"
    pic.box(x - w/2, y, w, h, 'bare', 18)
    pic.text(x, y + h/2 + 5, words, 15, anchor='middle')

def shape(pic, letters, x, y, anchor='start'): pic.text(x, y, axes(letters), 13.5, 'dim', 'mono', anchor)

def read_stream(pic, name, y):
    "The stream's copy goes to the right, through a norm"
    pic.arrow((SPINE, y + 20), (350, y + 20))
    shape(pic, 'b t d', 273, y + 12)
    weight(pic, name, MIDDLE, y, 280, 40, NORM)

def write_stream(pic, name, y, part, module):
    "The last matrix, and what it makes added to the stream"
    weight(pic, name, MIDDLE, y, 104, 48, part)
    pic.arrow((438, y + 24), (SPINE + 15, y + 24))
    shape(pic, 'b t d', 300, y + 16)
    pic.sign(SPINE, y + 24, '+', 'c2')
    pic.text(690, y + 29, module, 14, 'dim', 'mono', 'end')

def attention_half(pic, y):
    read_stream(pic, 'attention_norm', y)
    for name, x in (('wq', 372), ('wk', 492), ('wv', 612)):
        pic.arrow((x, y + 40), (x, y + 66))
        weight(pic, name, x, y + 66, 104, 48, ATTEND)
        pic.arrow((x, y + 114), (x, y + (208 if name == 'wv' else 142)))
    shape(pic, 'b t h k', 366, y + 133, 'end')
    operation(pic, 'rotary: turned by position', 432, y + 142, 224, 38)
    for x in (372, 492): pic.arrow((x, y + 180), (x, y + 208))
    pic.box(MIDDLE - 172, y + 208, 344, 62, 'bare', 18)
    pic.text(MIDDLE, y + 234, 'causal attention, head by head', 15, anchor='middle')
    pic.text(MIDDLE, y + 256, 'softmax of scores (b, h, t, s), s ≤ t', 14, 'dim', 'mono', 'middle')
    pic.arrow((MIDDLE, y + 270), (MIDDLE, y + 300))
    shape(pic, 'b t h k', 502, y + 290)
    write_stream(pic, 'wo', y + 300, ATTEND, 'attention')

def feed_forward_half(pic, y):
    read_stream(pic, 'ffn_norm', y)
    for name, x in (('w1', 412), ('w3', 572)):
        pic.arrow((x, y + 40), (x, y + 66))
        weight(pic, name, x, y + 66, 104, 48, FEED)
    shape(pic, 'b t f', 403, y + 134, 'end')
    shape(pic, 'b t f', 581, y + 134)
    pic.arrow((412, y + 114), (412, y + 142))
    operation(pic, 'SiLU', 412, y + 142, 104, 36)
    pic.arrow((412, y + 178), (412, y + 206), (MIDDLE - 15, y + 206))
    pic.arrow((572, y + 114), (572, y + 206), (MIDDLE + 15, y + 206))
    pic.sign(MIDDLE, y + 206, '×', 'bare')
    pic.arrow((MIDDLE, y + 221), (MIDDLE, y + 250))
    shape(pic, 'b t f', 502, y + 241)
    write_stream(pic, 'w2', y + 250, FEED, 'feed_forward')

def block(pic, top, bottom):
    "The right-hand side: one block, its stream as the spine"
    pic.box(226, top, 480, bottom - top, 'panel', 12)
    pic.text(288, top + 32, 'One block', 18, font='bold')
    pic.text(690, top + 32, 'layers.i', 14, 'dim', 'mono', 'end')
    pic.line((SPINE, top + 16), (SPINE, bottom - 30), kind='spine s2')
    pic.put('path', d=f'M{SPINE - 9} {bottom - 32}H{SPINE + 9}L{SPINE} {bottom - 14}Z', class_='f2')
    attention_half(pic, top + 54)
    feed_forward_half(pic, top + 434)

def model(pic, x, top):
    "The left-hand side: all blocks on one stream; x is its middle"
    pic.text(14, top + 32, 'The model', 18, font='bold')
    pic.text(x, top + 64, 'tokens (b, t)', 14, 'dim', 'mono', 'middle')
    pic.arrow((x, top + 72), (x, top + 92))
    pic.line((x, top + 144), (x, top + 416), kind='spine s2')
    weight(pic, 'tok_embeddings', x, top + 92, 160, 52, TABLE)
    shape(pic, 'b t d', x - 10, top + 167, 'end')
    for name, y in (('layers.0', 180), ('layers.1', 244), ('layers.L−1', 344)):
        pic.box(x - 68, top + y, 136, 42, 'c2', 8)
        pic.text(x, top + y + 26, name, 15, font='monobold', anchor='middle')
    pic.text(x + 14, top + 320, '⋮', 20, 'dim', font='bold')
    weight(pic, 'norm', x, top + 416, 136, 52, NORM)
    pic.arrow((x, top + 468), (x, top + 498))
    shape(pic, 'b t d', x - 10, top + 488, 'end')
    weight(pic, 'output', x, top + 498, 136, 52, TABLE)
    pic.arrow((x, top + 550), (x, top + 576))
    pic.text(x, top + 596, 'logits (b, t, v)', 14, 'dim', 'mono', 'middle')

def key(pic, x, y):
    "What filled and empty boxes mean; the sizes of 7B"
    for i, part in enumerate((TABLE, NORM, ATTEND, FEED)): pic.box(x + 8*i, y, 7, 22, f'p{part}', 2)
    pic.text(x + 40, y + 17, 'has weights', 14)
    pic.box(x, y + 32, 30, 22, 'bare', 11)
    pic.text(x + 40, y + 49, 'has none', 14)
    for i, (letter, size) in enumerate(SIZES.items()):
        pic.text(x + 70*(i % 2)*1.4, y + 104 + 22*(i//2), f'{letter} {size}', 14, 'dim', 'mono')
    pic.text(x, y + 82, 'In 7B:', 14)

def architecture(found):
    pic = Picture(720, 824, 'The architecture of LLaMA',
                  'Left, the model: tokens, embedding, L blocks on one residual stream, norm, output, '
                  'logits. Right, one block: the stream passes straight down; attention and SwiGLU each read '
                  'it through an RMSNorm and add to it.')
    top, bottom = 14, 810
    pic.line((174, top + 244), (226, top + 12), kind='dash')
    pic.line((174, top + 286), (226, bottom - 12), kind='dash')
    block(pic, top, bottom)
    model(pic, 106, top)
    key(pic, 26, top + 640)
    return pic.svg()

# --- 3: the map -------------------------------------------------------------------------------------

RAIL, BAND = (16, 34, 52, 70), 88   # x of the tracks and of the parts
CHIPS, CHIP = 244, 222          # x of their pages, and how wide one is

def pages_of(part, found):
    "(number, title) of the pages of a part"
    return [page for page in found.values() if page[0].startswith(str(part))]

def written_parts(found): return [part for part in PARTS if pages_of(part, found)]

def listed(parts): return ', '.join(map(str, parts))

def forms(title):
    "Lines of a title, the whole one and what stands before its colon"
    return [wrap(words, CHIP - 46, 14) for words in (title, title.split(':')[0])]

def chips(pic, part, titled, y):
    "Two columns of pages, as low as their short titles allow; returns where they end"
    for i in range(0, len(titled), 2):
        row = [(place, *forms(title)) for place, title in titled[i:i + 2]]
        most = max(len(short) for _, _, short in row)
        high = 16 + 18*most
        for x, (place, whole, short) in zip((CHIPS, CHIPS + CHIP + 6), row):
            pic.box(x, y, CHIP, high, f'c{part}', 7)
            pic.text(x + 10, y + 22, place, 14, 'dim', 'monobold')
            for n, line in enumerate(whole if len(whole) <= most else short):
                pic.text(x + 38, y + 22 + 18*n, line, 14)
        y += high + 6
    return y - 6

def band(pic, part, titled, y, left=BAND):
    "One part: its name, what it needs, its pages; returns where it ends"
    at = len(pic.body)
    lines = wrap(PARTS[part].name, CHIPS - left - 46, 15, 'bold')
    needs = [n for n in PARTS[part].needs if n]
    end = max(chips(pic, part, titled, y + 10), y + 26 + 19*len(lines + needs[:1])) + 10
    pic.box(left, y, 720 - left - 14, end - y, f'p{part}', 10)
    pic.body.insert(at, pic.body.pop())   # below its pages
    pic.text(left + 14, y + 32, str(part), 19, font='bold')
    for n, line in enumerate(lines): pic.text(left + 36, y + 31 + 19*n, line, 15, font='bold')
    if needs: pic.text(left + 36, y + 31 + 19*len(lines), f'after {listed(needs)}', 13, 'dim')
    return end

def tracks(pic, middles):
    "Lines from the head of the picture through the parts that belong to them; {part: y} of the parts"
    for i, (x, (name, parts)) in enumerate(zip(RAIL, TRACKS.items())):
        y, colour = 32 + 28*i, (2, 5, 3, 7)[i]
        stops = [middles[p] for p in parts if p in middles]
        pic.line((BAND + 6, y), (x, y), (x, stops[-1]), kind=f'spine s{colour}')
        for stop in stops: pic.put('circle', cx=x, cy=stop, r=9, class_=f'c{colour}', stroke_width=4)
        pic.text(BAND + 14, y + 5, name, 16, font='bold')
        pic.text(706 - 14, y + 5, f'parts {listed(parts)}', 15, 'dim', anchor='end')

def page_map(found):
    ways = '; '.join(f'{name}: parts {listed(parts)}' for name, parts in TRACKS.items())
    pic = Picture(720, 0, 'The map of the pages',
                  f'All pages, part by part, and four ways through them. {ways}.')
    y, middles = 140, {}
    for part in written_parts(found):
        end = band(pic, part, pages_of(part, found), y)
        middles[part], y = (y + end)/2, end + 9
    tracks(pic, middles)
    pic.size = 720, round(y + 5)
    return pic.svg()

# --- 4: one part, at the head of its first page -----------------------------------------------------

def strip(pic, part, written):
    "All written parts in a row, this one with its colour"
    pitch = (720 - 28)/len(written)
    for i, other in enumerate(written):
        x, here = 14 + pitch*i, other == part
        pic.box(x, 12, pitch - 6, 34, f'p{part}' if here else 'panel', 8)
        pic.text(x + (pitch - 6)/2, 34, str(other), 15, 'ink' if here else 'dim', 'bold', 'middle')

def part_map(found, part):
    "Where a part stands among the others, and its pages"
    written = written_parts(found)
    pic = Picture(720, 0, f'Part {part}: {PARTS[part].name}',
                  f'Part {part} of {len(written)} parts, numbered {listed(written)}, with its pages.')
    strip(pic, part, written)
    pic.size = 720, round(band(pic, part, pages_of(part, found), 56, left=14) + 14)
    return pic.svg()

# --- all of them ------------------------------------------------------------------------------------

PICTURES = {'overview.svg': overview, 'architecture.svg': architecture, 'map.svg': page_map}

def draw(nbs=ROOT/'nbs'):
    "{file name: text} of all pictures"
    found = pages(nbs)
    parts = {f'part-{part}.svg': part_map(found, part) for part in written_parts(found)}
    return {name: picture(found) for name, picture in PICTURES.items()} | parts

def main():
    drawn = draw()
    there = {path.name: path.read_text(encoding='utf-8') for path in IMAGES.glob('*.svg')}
    stale = [name for name, text in drawn.items() if there.get(name) != text]
    if '--check' in sys.argv[1:]: sys.exit(f'{", ".join(stale)} out of date: make prepare' if stale else 0)
    IMAGES.mkdir(exist_ok=True)
    for name in stale:
        (IMAGES/name).write_text(drawn[name], encoding='utf-8')
        print(f'nbs/images/{name} written')

if __name__ == '__main__': main()
