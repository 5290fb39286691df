"Projects that are damaged, hostile or strange, and licences judged from outside."
import io, os, random, re, tarfile, zipfile
from functools import partial
import pytest
from llama_nb.core import UserError
from llama_nb.data.documents import Document
from llama_nb.data.github import (GithubRules, MAX_FILE, clean_code, clean_github, github_stages,
                                  is_allowed, legal_header, licence_of_field, licence_of_name,
                                  licence_of_text, project_licence, read_project, redpajama_header)
from llama_nb.data.stage import Stage, Tally, preset

MIT = 'Permission is hereby granted, free of charge, to any person obtaining a copy\n'
NAMES = ('MIT', 'Apache-2.0', 'GPL-3.0-only', 'Zlib', 'BSD-3-Clause')
ALLOWED = ('MIT', 'Apache-2.0', 'BSD-3-Clause')

# --- licences -----------------------------------------------------------------------------------

def formula(rng, depth=3):
    if depth == 0 or rng.random() < .3: return rng.choice(NAMES)
    parts = [formula(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    joined = f' {rng.choice(["AND", "OR"])} '.join(parts)
    return f'({joined})' if rng.random() < .5 else joined

def as_python(found): return {'AND': 'and', 'OR': 'or'}.get(found[0], str(found[0] in ALLOWED))

def test_formulas_mean_what_python_says():
    rng, seen = random.Random(0), set()
    for _ in range(1000):
        text = formula(rng)
        python = re.sub(r'[^\s()]+', as_python, text)
        seen.add(wanted := eval(python))
        assert is_allowed(text, ALLOWED) == wanted, text
    assert seen == {True, False}

def test_what_packaging_refuses_is_not_allowed():
    licences = pytest.importorskip('packaging.licenses')
    for text in ('MIT AND', 'AND MIT', '(MIT', 'MIT)', 'MIT MIT', '()', 'MIT OR OR MIT', '', 'MIT (MIT)'):
        with pytest.raises(licences.InvalidLicenseExpression): licences.canonicalize_license_expression(text)
        assert not is_allowed(text, ALLOWED), text

@pytest.mark.parametrize('text', ['('*100_000 + 'MIT' + ')'*100_000, 'MIT AND '*500 + 'GPL-3.0-only', 'МIT',
                                  'MIT WITH', 'NOT MIT', 'MIT ' + ' '*3000 + 'AND GPL-3.0-only'])
def test_hostile_formulas(text): assert not is_allowed(text, ALLOWED)

@pytest.mark.parametrize('said', ['GPL-3.0', 'Dual: MIT or GPL', 'MIT-like', 'not BSD', 'Proprietary',
                                  'a'*10_000, 'MIT\n\nand the GNU General Public License', '\u202eTIM',
                                  'BSD or whatever'])
def test_fields_that_are_no_permission(said): assert not is_allowed(licence_of_field(said), ALLOWED)

def test_two_licences_in_one_text_bind_both():
    assert licence_of_text(MIT + 'GNU General\nPublic   License') == 'LicenseRef-GNU AND MIT'
    assert licence_of_text('') == ''

BSD = 'Redistribution and use in source and binary forms ... to endorse or promote products. '

@pytest.mark.parametrize('text, licence', [
    (MIT + 'The Software shall be used for Good, not Evil.', 'JSON AND MIT'),
    (MIT + '"Commons Clause" License Condition v1.0', 'LicenseRef-Commons-Clause AND MIT'),
    (BSD + 'All advertising materials mentioning features or use of this software must', 'BSD-4-Clause'),
    ('The Apache Software License, Version 1.1\n' + BSD, 'Apache-1.1'),
    (BSD + "NO EXPRESS OR IMPLIED LICENSES TO ANY PARTY'S PATENT RIGHTS", 'BSD-3-Clause-Clear')])
def test_a_text_with_one_more_condition_is_another_licence(text, licence):
    assert licence_of_text(text) == licence_of_field(text) == licence
    assert not is_allowed(licence, ALLOWED) and licence_of_text(BSD) == 'BSD-3-Clause'

@pytest.mark.parametrize('said, licence', [
    ('The MIT License (MIT)', 'MIT'), ('Apache License 2.0 (Apache-2.0)', 'Apache-2.0'),
    ('MIT License (Expat)', 'MIT'), ('BSD License (3-clause)', 'BSD-3-Clause'),
    ('MIT (Apache-2.0)', 'LicenseRef-MIT-Apache-2.0'), ('MIT (but ask us)', 'LicenseRef-MIT-but-ask-us'),
    ('GPL (MIT)', 'LicenseRef-GPL-MIT'), ('(MIT)'*9, 'LicenseRef-' + '-'.join(['MIT']*9))])
def test_a_name_that_is_repeated_in_brackets(said, licence): assert licence_of_name(said) == licence

@pytest.mark.parametrize('name', ['license.go', 'license.py', 'license-header.txt', 'LICENSE.header',
                                  'copying.c'])
def test_files_that_only_sound_like_a_licence(tmp_path, name):
    (tmp_path/'LICENSE.md').write_text(MIT)
    (tmp_path/name).write_text('Copyright Somebody. Licensed under the GNU General Public License.')
    assert project_licence(tmp_path) == 'MIT'

# --- archives -----------------------------------------------------------------------------------

def tar_of(path, files, mode='w', odd=()):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in odd: tar.addfile(info)
    return path

def zip_of(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(name, data)
    return path

FILES = {'p/LICENSE': MIT.encode(), 'p/a.py': b'a = 1\n', 'p/b.py': 'b = "עברית e\u0301"\n'.encode()}

def read(path):
    tally = Tally()
    return [*read_project(path, tally.problem)], tally

@pytest.mark.parametrize('name, mode', [('p.tar', 'w'), ('p.tar.gz', 'w:gz'), ('p.tar.bz2', 'w:bz2'),
                                        ('p.tar.xz', 'w:xz'), ('p.zip', None)])
def test_every_archive_gives_the_same(tmp_path, name, mode):
    path = tar_of(tmp_path/name, FILES, mode) if mode else zip_of(tmp_path/name, FILES)
    docs, tally = read(path)
    assert [(d.metadata['path'], d.text, d.licence) for d in docs] == [
        ('p/a.py', 'a = 1\n', 'MIT'), ('p/b.py', 'b = "עברית e\u0301"\n', 'MIT')]
    assert not tally.unread

def odd_entry(kind, name='p/odd.py', to='/etc/passwd'):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info

BAD_NAMES = ('../out.py', '/etc/x.py', 'p/../../x.py', 'C:\\x.py', '..\\x.py')

def test_traversal_links_and_devices_in_a_tar(tmp_path):
    odd = [odd_entry(k) for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)]
    docs, tally = read(tar_of(tmp_path/'p.tar', FILES | {n: b'x = 1\n' for n in BAD_NAMES}, odd=odd))
    assert len(docs) == 2 and tally.unread == len(BAD_NAMES) + len(odd)

def test_traversal_and_links_in_a_zip(tmp_path):
    path = zip_of(tmp_path/'p.zip', FILES | {n: b'x = 1\n' for n in BAD_NAMES})
    with zipfile.ZipFile(path, 'a') as z:
        link = zipfile.ZipInfo('p/link.py')
        link.external_attr = 0o120777 << 16
        z.writestr(link, '/etc/passwd')
    docs, tally = read(path)
    assert len(docs) == 2 and tally.unread == len(BAD_NAMES) + 1

def test_odd_files_cost_themselves(tmp_path):
    files = FILES | {'p/nul.py': b'a\0b', 'p/latin.py': b'\xe9', 'p/long.py': b'x'*(MAX_FILE + 1),
                     'p/empty.py': b'', 'p/image.png': b'\x89\0', 'p/bom.py': b'\xef\xbb\xbfx = 1\n',
                     'p/u16.py': 'x'.encode('utf-16')}
    docs, tally = read(zip_of(tmp_path/'p.zip', files))
    assert [d.metadata['path'] for d in docs] == ['p/a.py', 'p/b.py', 'p/empty.py', 'p/bom.py']
    assert tally.unread == 4 and docs[-1].text == 'x = 1\n'

def test_a_folder_with_loops_and_pipes(tmp_path):
    root = tmp_path/'p'
    root.mkdir()
    (root/'a.py').write_text('a = 1\n')
    (root/'loop').symlink_to(root)
    (root/'self.py').symlink_to(root/'self.py')
    os.mkfifo(root/'pipe.py')
    docs, tally = read(root)
    assert [d.id for d in docs] == ['p/a.py'] and tally.unread == 2

# --- damage and bombs ---------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['p.tar', 'p.tar.gz', 'p.zip'])
def test_damaged_archives_end_in_a_report_and_nothing_else(tmp_path, name):
    rng = random.Random(1)
    many = FILES | {f'p/{i}.py': rng.randbytes(500).hex().encode() for i in range(20)}
    make = zip_of if name.endswith('zip') else partial(tar_of, mode='w:gz' if 'gz' in name else 'w')
    whole = make(tmp_path/name, many).read_bytes()
    for i in range(150):
        data = bytearray(whole[:rng.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(rng.randint(1, 20)):
            if data: data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path/name).write_bytes(data)
        docs, tally = read(tmp_path/name)
        assert all(isinstance(d, Document) for d in docs)
        assert tally.unread or (i % 3 and docs), i          # what is cut off is always told

@pytest.mark.parametrize('field, size', [(8, 2), (10, 2), (12, 4), (16, 4)])
def test_a_zip_whose_last_record_is_damaged_is_told(tmp_path, field, size):
    "each field that says how much is in the archive, and where: `zipfile` reads fewer files, or none"
    path = zip_of(tmp_path/'p.zip', FILES)
    whole = path.read_bytes()
    record = whole.rindex(b'PK\5\6')
    for value in 0, 1, 63, 2**(8*size) - 2:
        data = bytearray(whole)
        data[record + field:record + field + size] = value.to_bytes(size, 'little')
        path.write_bytes(data)
        docs, tally = read(path)
        assert tally.unread or len(docs) == 2, (value, docs)

def test_a_zip_with_a_comment_and_an_empty_one_are_read(tmp_path):
    path = zip_of(tmp_path/'p.zip', FILES)
    with zipfile.ZipFile(path, 'a') as z: z.comment = b'made by hand ' * 1000
    docs, tally = read(path)
    assert len(docs) == 2 and not tally.unread
    docs, tally = read(zip_of(tmp_path/'empty.zip', {}))
    assert not docs and not tally.unread

def test_what_stands_before_the_damage_is_given(tmp_path):
    path = tar_of(tmp_path/'p.tar', FILES)
    path.write_bytes(path.read_bytes()[:512*5 + 5])
    docs, tally = read(path)
    assert [d.metadata['path'] for d in docs][:1] == ['p/a.py'] and docs[0].licence == 'MIT' and tally.unread
    with pytest.raises(UserError, match='p.tar'): [*read_project(path)]

def test_a_header_that_asks_for_gigabytes(tmp_path):
    info = tarfile.TarInfo('p/a.py')
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (tmp_path/'p.tar').write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b'a'*4096)
    docs, tally = read(tmp_path/'p.tar')
    assert not docs and any('8,589,934,592' in p for p in tally.problems)

def test_bombs(tmp_path):
    zeros = {f'p/{i}.py': b' '*MAX_FILE for i in range(60)}
    for path in (zip_of(tmp_path/'p.zip', zeros), tar_of(tmp_path/'p.tar.gz', zeros, 'w:gz')):
        docs, tally = read(path)
        assert len(docs) < 60 and any('200-fold' in p for p in tally.problems)

def test_wrong_kinds(tmp_path):
    for name in ('p.rar', 'p.tar.gz', 'p.zip', 'none'):
        (tmp_path/name).write_bytes(b'')
        docs, tally = read(tmp_path/name)
        assert not docs and tally.unread
    with pytest.raises(UserError, match='no file'): [*read_project(tmp_path/'nowhere.zip')]

# --- the licence of the project -----------------------------------------------------------------

def test_the_nearest_and_most_formal_statement_counts(tmp_path):
    deep = {'p/vendor/LICENSE': b'GNU General Public License'}
    assert project_licence(zip_of(tmp_path/'a.zip', FILES | deep)) == 'MIT'
    toml = {'p/pyproject.toml': b'[project]\nlicense = {text = "Apache-2.0"}\n'}
    assert project_licence(zip_of(tmp_path/'b.zip', FILES | toml)) == 'Apache-2.0'
    assert project_licence(zip_of(tmp_path/'c.zip', FILES | {'p/package.json': b'['*100_000})) == 'MIT'
    wheel = {'x-1.dist-info/METADATA': b'Name: x\nLicense-Expression: GPL-3.0-only\n', 'x/a.py': b'a = 1\n'}
    assert project_licence(zip_of(tmp_path/'x.whl', wheel)) == 'GPL-3.0-only'
    assert project_licence(zip_of(tmp_path/'d.zip', {'p/a.py': b''})) == ''

# --- cleaning -----------------------------------------------------------------------------------

CODE = 'def double(number):\n    return 2*number\n'

@pytest.mark.parametrize('name, text, left', [
    ('x.py', f'# Copyright A\n{CODE}', CODE), ('x.py', f'# explains\n{CODE}', f'# explains\n{CODE}'),
    ('x.py', f'#!/bin/python\n# -*- coding: utf-8 -*-\n# (c) 2001 A\n{CODE}',
     f'#!/bin/python\n# -*- coding: utf-8 -*-\n{CODE}'),
    ('x.py', f'\r\n# Copyright A\r\n\r\n{CODE}', CODE), ('x.c', '/* Copyright */ int n;', 'int n;'),
    ('x.c', '/* Copyright int n;', '/* Copyright int n;'),
    ('x.html', '<!DOCTYPE html>\n<!-- Copyright -->\n<p>', '<!DOCTYPE html>\n<p>'),
    ('x.php', '<?php\n// Copyright\necho 1;', '<?php\necho 1;'), ('x.sql', '-- Copyright\nSELECT', 'SELECT'),
    ('README.md', '# Copyright law\n', '# Copyright law\n'), ('x.py', '', '')])
def test_headers(name, text, left): assert legal_header(text, name) == left

@pytest.mark.parametrize('text', ['/*'*300_000, '#\n'*300_000, '\n'*900_000, ' \n'*300_000 + 'x',
                                  '<!--'*200_000, '/**/'*200_000, '# the '*150_000 + 'x',
                                  '// ' + 'of the '*130_000])
@pytest.mark.parametrize('name', ['x.py', 'x.c', 'x.html', 'x.sql'])
def test_headers_take_linear_time(text, name):
    legal_header(text, name)
    redpajama_header(text)

def test_nothing_is_lost_uncounted():
    rng = random.Random(2)
    lines = ['# Copyright A\n', 'x = 1\n', '-'*200 + '\n', 'y'*1200 + '\n', '\n',
             'e\u0301 עברית\n', '\ud800\n']
    def made(i):
        text, ending = ''.join(rng.choices(lines, k=rng.randint(0, 6))), rng.choice(['py', 'png'])
        return Document(text, f'{i}.{ending}', licence=rng.choice(['MIT', 'GPL-3.0-only', '']))
    docs = [made(i) for i in range(500)]
    for rules in (GithubRules(), preset(GithubRules, 'redpajama'), preset(GithubRules, 'strict')):
        stages, left, n = github_stages(lambda: docs, rules), docs, len(docs)
        for stage in stages:
            left = [*stage(left)]
            tally = stage.tally
            assert tally.documents == n and not tally.unread
            removed = sum(r.removed for r in tally.rules.values())
            assert tally.bytes_in - tally.bytes_out <= removed
            n = len(left)
        assert 0 < n < len(docs) and len({d.id for d in left}) == n

def test_copies_before_and_after_headers():
    docs = [Document(f'# Copyright {y}\n{CODE}', f'{y}.py', licence='MIT') for y in (2003, 2001, 2002)]
    docs.append(replace_licence(docs[1], '2000.py', 'GPL-3.0-only'))
    def run(rules):
        left = docs
        for stage in github_stages(lambda: docs, rules): left = [*stage(left)]
        return [d.id for d in left]
    assert run(GithubRules()) == ['2001.py']                # a copy under another licence takes no place
    assert run(preset(GithubRules, 'redpajama')) == ['2003.py', '2001.py', '2002.py']
    both = GithubRules(copies_first=True)
    assert run(both) == ['2003.py', '2001.py', '2002.py']

def replace_licence(doc, name, licence): return Document(doc.text, name, licence=licence)

def test_cleaning_is_a_pure_function():
    doc = Document(f'# Copyright\n{CODE}', 'x.py', licence='MIT')
    assert clean_github(doc) == clean_github(doc) and doc.text.startswith('# Copyright')
    assert clean_code(Document('x', 'x.exe'))[0] is None
    assert clean_github(Document(CODE, 'x.py', licence='PSF-2.0'))[0] is None
    [*Stage('github', clean_github)([doc])]
