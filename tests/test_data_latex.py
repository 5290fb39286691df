"LaTeX: random macros against their meaning, another parser as judge, bytes in any encoding."
import random
import pytest
from llama_nb.data.latex import TexRun, decode_tex, expand_macros, join_tokens, run_tex, tokenise, work_limit

def random_macros(rng):
    "(LaTeX with macros, what it means): bodies use earlier macros, arguments are nested"
    macros = []                          # (name, number of arguments, optional first?, body as a function)
    def piece(depth, args):
        kind = rng.random()
        if kind < .4 or not depth: return [rng.choice(['x', 'yz', '1', ' + ', r'\alpha ', '{u}', r'\%'])]*2
        if kind < .55 and args: return f'#{(k := rng.randrange(args) + 1)}', k
        if kind < .85 and macros: return call(depth - 1, args)
        parts = [piece(depth - 1, args) for _ in range(3)]
        return ''.join(p[0] for p in parts), [p[1] for p in parts]
    def call(depth, args):
        i = rng.randrange(len(macros))
        name, n, default, _ = macros[i]
        given = [piece(depth, args) for _ in range(n)]
        source = name
        for k, (text, _) in enumerate(given):
            use = k > 0 or default is None or rng.random() < .5
            brackets = '[]' if k == 0 and default is not None else ['', '']
            if use: source += f'{brackets[0]}{{{text}}}{brackets[1]}'
            if k == 0: first = use
        values = [m for _, m in given]
        if default is not None: values[0] = ['{', values[0], '}'] if first else default
        return source + (' ' if n else '{}'), ('call', i, values)
    def meaning(m, values):
        if isinstance(m, str): return m
        if isinstance(m, int): return values[m - 1]
        if isinstance(m, tuple): return meaning(macros[m[1]][3], [meaning(v, values) for v in m[2]])
        return ''.join(meaning(part, values) for part in m)
    head = ''
    for i in range(rng.randint(1, 6)):
        name, n = '\\m' + 'abcdef'[i], rng.randrange(4)
        default = 'd' if n and rng.random() < .4 else None
        body, means = piece(3, n)
        optional = f'[{n}]' + (f'[{default}]' if default else '') if n else ''
        plain = ''.join(f'#{k + 1}' for k in range(n))
        head += f'\\newcommand{{{name}}}{optional}{{({body})}}\n' if default or rng.random() < .5 else \
                f'\\def{name}{plain}{{({body})}} % old\n'
        macros.append((name, n, default, ['(', means, ')']))
    calls = [call(3, 0) for _ in range(4)]
    return head + '|'.join(c[0] for c in calls), '|'.join(meaning(c[1], []) for c in calls)

def test_random_macros_mean_what_they_mean():
    for seed in range(300):
        source, wanted = random_macros(random.Random(seed))
        assert ''.join(expand_macros(source).split()) == ''.join(wanted.split()), (seed, source)

def test_another_parser_reads_what_is_left():
    walker = pytest.importorskip('pylatexenc.latexwalker').LatexWalker
    for seed in range(30):
        source, _ = random_macros(random.Random(seed))
        walker(expand_macros(source), tolerant_parsing=False).get_latex_nodes()

def test_decode_never_fails():
    rng = random.Random(0)
    for _ in range(300):
        text, name = decode_tex(rng.randbytes(rng.randrange(40)), rng.choice(['', 'latin1', 'hex', 'none',
            'utf8']))
        assert '\0' not in text and '\r' not in text and name

def test_what_a_run_counts_is_what_it_took_out():
    "Text out, comments, definitions and hidden text are the text in, where no macro is used"
    text = 'a \\def\\b{c}d \\iffalse e\\fi f % g\n h'
    tokens, comments = tokenise(text)
    tex = run_tex(TexRun({'x': tokens}, work_limit(len(tokens))), 'x')
    assert (comments, tex.definition_bytes, tex.hidden_bytes) == (3, 9, 13)
    assert len(join_tokens(tex.out)) + comments + tex.definition_bytes + tex.hidden_bytes == len(text)

@pytest.mark.parametrize('inline', [r'\lstinline|a % b|', r'\lstinline[language=C]!%d!',
                                    r'\lstinline{printf("%d", {x})}', r'\mintinline{c}|a % b|',
                                    r'\mintinline[breaklines]{c}{printf("%d", \x)}'])
def test_no_comment_begins_in_verbatim_text_within_a_line(inline):
    text = f'\\def\\x{{y}}\\section{{A}} x {inline} and y.\nMore. % gone'
    assert expand_macros(text) == f'\\section{{A}} x {inline} and y.\nMore. '

def test_the_branch_that_is_read_loses_its_fi():
    for text, wanted in [(r'a \iffalse b \else c \fi d', 'a  c  d'),
                         (r'\iffalse b\else\iffalse c\else d\ifx e\fi\fi\fi f', r' d\ifx e\fi f'),
                         (r'\def\w#1{<#1>}\w{\iffalse b\else c\fi}d', '< c>d'),
                         (r'a \iffalse b\else c', 'a  c')]:
        tokens, _ = tokenise(text)
        tex = run_tex(TexRun({'x': tokens}, work_limit(len(tokens))), 'x')
        assert join_tokens(tex.out) == wanted, text
        if not tex.expansions: assert len(wanted) + tex.hidden_bytes == len(text)

def test_work_has_a_limit_whatever_the_macros_do():
    tokens, _ = tokenise(r'\def\a{' + 'x '*5000 + '}' + r'\a,'*5000)
    tex = run_tex(TexRun({'x': tokens}, limit=20_000), 'x')
    assert 20_000 <= tex.work < 40_000 and tex.out.count('\\a') > 4900
