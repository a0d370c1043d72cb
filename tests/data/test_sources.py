"""Reading: every bad line named, every good one kept."""

import gzip
import json
import os
import random
import re

import numpy as np
import pytest

from rlhf_jax.data import formats, sources
from rlhf_jax.data.strict_json import parse_json
from rlhf_jax.errors import InputError

GOOD = {"input_text": "Say שלום 👋", "candidate_0": "a", "candidate_1": "b", "choice": 1}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return str(path)


def test_one_bad_line_is_named_and_the_others_are_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, b'{"input_text": ', GOOD)
    with pytest.raises(InputError) as error:
        sources.read_rows(path)
    assert f"{path}, line 2: not JSON (" in str(error.value)
    assert "the other lines of the file are not affected" in str(error.value)
    assert error.value.status == 2
    assert [row.line for row in sources.read_rows(path, max_bad_records=0.4)] == [1, 3]
    with pytest.raises(InputError):  # a third is more than 0.3
        sources.read_rows(path, max_bad_records=0.3)


def test_many_bad_lines_show_ten_and_the_count(tmp_path):
    path = write(tmp_path / "a.jsonl", *[b"x"] * 25, GOOD)
    with pytest.raises(InputError) as error:
        sources.read_rows(path)
    message = str(error.value)
    assert "25 of 26 records" in message and "and 15 more" in message
    assert "line 10:" in message and "line 11:" not in message


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
        (b"3", "is a JSON number, expected an object"),
        (b"[1]", "is a JSON array"),
        (b"null", "is a JSON null"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 0xff"),
        (b'{"a": "\\ud83d"}', "lone surrogate"),
        (b'{"\\udc00": "a"}', "lone surrogate"),
        (b'{"a": "\x01"}', "Invalid control character"),
        (b'{"a": 1} {"a": 2}', "text after the end"),
        (b'{"a": 1}\r{"a": 2}', "text after the end"),  # line ends of old Macs
    ],
)
def test_nasty_lines(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(InputError) as error:
        sources.read_rows(path)
    assert f"{path}, line 2: " in str(error.value) and reason in str(error.value)
    assert len(sources.read_rows(path, max_bad_records=0.5)) == 2


def test_text_that_only_looks_like_a_line_end_stays_inside_its_record(tmp_path):
    text = "one\u2028two\u0085three\u000bfour\u001cfive"
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": text}, ensure_ascii=False).encode())
    (row,) = sources.read_rows(path)
    assert row.fields["prompt"] == text


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}')
    assert [(row.line, row.fields["prompt"]) for row in sources.read_rows(str(path))] == [(1, "a"), (4, "b")]


def test_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert [row.line for row in sources.read_rows(str(path))] == [1, 2]
    path.write_bytes(path.read_bytes()[:-9])  # a download cut short
    with pytest.raises(InputError, match="cannot be read"):
        sources.read_rows(str(path))
    path.write_bytes(b"not gzip")
    with pytest.raises(InputError, match="cannot be read"):
        sources.read_rows(str(path))


def test_json_array_has_line_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "a"}, 3, {"prompt": "b"}], indent=1))
    with pytest.raises(InputError, match=r"a\.json, line 5: is a JSON number"):
        sources.read_rows(str(path))
    assert [row.line for row in sources.read_rows(str(path), max_bad_records=0.5)] == [2, 6]
    path.write_text('[{"prompt": "a"},\n {"prompt": "b"\n]')
    with pytest.raises(InputError, match=r"the record from line 2: not JSON .*line 3"):
        sources.read_rows(str(path), max_bad_records=1.0)
    for text in (
        '[{"prompt": "a"} {"prompt": "b"}]',
        '[{"prompt": "a"}] x',
        '[{"prompt": "a"}',
        '[{"prompt": "a"},]',
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"line 1: "):
            sources.read_rows(str(path))
    path.write_text("[ ]")
    with pytest.raises(InputError, match="holds no records"):
        sources.read_rows(str(path))
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')  # lines under the name of an array
    assert len(sources.read_rows(str(path))) == 2


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('input_text,candidate_0,candidate_1,choice\n"Say\nhi",a,b,1\nx,y\né,a,b,2\n'.encode())
    with pytest.raises(InputError, match="line 4: 2 values for 4 columns"):
        sources.read_rows(str(path))
    rows = sources.read_rows(str(path), max_bad_records=0.5)
    assert [(row.line, row.fields["input_text"]) for row in rows] == [(2, "Say\nhi"), (5, "é")]
    with pytest.raises(InputError, match=r"line 5: 'choice' is '2'; expected 0 or 1"):
        formats.pairs(rows)
    assert formats.pairs(rows[:1])[0].chosen == "b"  # CSV has no numbers, so "1" is 1 here
    path.write_bytes(b'prompt\n"never closed\n')
    with pytest.raises(InputError, match="line 2: not CSV"):
        sources.read_rows(str(path))
    path.write_bytes(b"prompt\n\xff\n")
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        sources.read_rows(str(path))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), path)
    rows = sources.read_rows(path)
    assert [row.fields for row in rows] == [{"prompt": "a"}, {"prompt": None}]
    with pytest.raises(InputError, match="'prompt' is null; expected a string"):
        formats.prompts(rows)
    write(tmp_path / "b.parquet", b"no parquet")
    with pytest.raises(InputError, match="no readable parquet"):
        sources.read_rows(str(tmp_path / "b.parquet"))


def test_globs_lists_and_limits(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write(tmp_path / name, {"prompt": name}, {"prompt": name})
    read = lambda spec, **more: [row.fields["prompt"] for row in sources.read_rows(spec, **more)]
    assert read(f"{tmp_path}/*.jsonl") == ["a.jsonl"] * 2 + ["b.jsonl"] * 2
    assert read(f"{tmp_path}/**/*.jsonl", limit=5)[-1] == "deep/c.jsonl"
    assert read(f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl", limit=3) == ["b.jsonl"] * 2 + ["a.jsonl"]
    for limit in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="limit is"):
            read(f"{tmp_path}/*.jsonl", limit=limit)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="max_bad_records is"):
            read(f"{tmp_path}/*.jsonl", max_bad_records=fraction)


def test_nothing_there_names_the_pattern_and_the_nearest_directory(tmp_path):
    for pattern, what in (("no/such/*.jsonl", "no file matches this pattern"), ("no.jsonl", "no such file")):
        with pytest.raises(InputError) as error:
            sources.read_rows(f"{tmp_path}/{pattern}")
        assert f"{tmp_path}/{pattern}: {what}" in str(error.value)
        assert str(error.value).endswith(f"directory that exists is {tmp_path}")


def test_wrong_kinds_of_path(tmp_path):
    write(tmp_path / "a.txt", GOOD)
    for spec, what in (
        (str(tmp_path), "is a directory"),
        (f"{tmp_path}/a.txt", "unknown kind of file"),
        ("gs://bucket/a.jsonl", "not a local file"),
        (" , ", "names no file"),
        ("", "expected a file"),
    ):
        with pytest.raises(InputError, match=what):
            sources.read_rows(spec)
    write(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="holds no records"):
        sources.read_rows(f"{tmp_path}/empty.jsonl")
    write(tmp_path / "lfs.jsonl", b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="Git LFS pointer"):
        sources.read_rows(f"{tmp_path}/lfs.jsonl")


def test_hub_name_without_a_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(InputError, match=r"nobody/nothing: no such file.*to_json"):
        sources.read_rows("nobody/nothing")


def test_tfds_folder_and_unknown_name(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Prefs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # else it looks beside its source file, with a package that TFDS does not ask for

        def _info(self):
            features = {"prompt": tfds.features.Text(), "choice": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": ((i, {"prompt": f"é{i}", "choice": i}) for i in range(3))}

        def _generate_examples(self):
            return iter(())

    builder = Prefs(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    rows = sources.read_rows(f"tfds:{builder.data_dir}")
    assert sorted(row.fields["prompt"] for row in rows) == ["é0", "é1", "é2"]
    assert {type(row.fields["choice"]) for row in rows} == {int}
    with pytest.raises(InputError, match="download_and_prepare"):
        sources.read_rows("tfds:no_such_data_set")
    with pytest.raises(InputError, match="split 'test'"):
        sources.read_rows(f"tfds:{builder.data_dir}", split="test")


def test_two_thousand_mutated_lines(tmp_path):
    """Whatever happens to a line, it is either a good record or a named bad one, and the reader goes on."""
    rng, line = random.Random(0), json.dumps(GOOD, ensure_ascii=False).encode()
    lines = []
    for _ in range(2000):
        data = bytearray(line)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data) or 1)
            kind = rng.randrange(4) if data else 2
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[place]
            elif kind == 2:
                data.insert(place, rng.randrange(256))
            else:
                del data[max(place, 1) :]
        lines.append(bytes(data).replace(b"\n", b" ") or b"x")
    path = write(tmp_path / "fuzz.jsonl", *lines, GOOD)
    rows = sources.read_rows(path, max_bad_records=1.0)
    kept = {row.line for row in rows}
    assert 100 < len(rows) < 1900 and 2001 in kept
    for number, data in enumerate(lines, 1):
        try:
            usable = isinstance(parse_json(data), dict)
        except ValueError:
            usable = False
        assert usable == (number in kept)
    records = formats.pairs(rows, max_bad_records=1.0)
    assert records[-1].chosen == "b" and len(records) < len(rows)
    assert all(isinstance(x, str) and x.strip() for r in records for x in (r.prompt, r.chosen, r.rejected))
    with pytest.raises(InputError, match=r"fuzz\.jsonl, line \d+: "):
        formats.pairs(rows)


def test_openings():
    texts = [row.fields["input_text"] for row in sources.openings()]
    assert len(texts) == len({text.lower() for text in texts}) == 480
    assert all(3 <= len(text.split()) <= 9 and text[-1].isalnum() and text[0].isalnum() for text in texts)
    firsts = [text.split()[0] for text in texts]
    assert len(set(firsts)) > 150 and max(map(firsts.count, set(firsts))) < 48


def test_packaged_files_are_read_by_name_and_their_sums_are_right():
    rows = sources.read_rows("packaged:arithmetic")
    for row in rows:
        a, b = map(int, re.search(r"(\d+) \+ (\d+) =$", row.fields["prompt"]).groups())
        assert row.fields["answer"] == a + b
    assert len({row.fields["prompt"] for row in rows}) == len(rows) == 1000
    with pytest.raises(InputError, match="packaged:sums.*openings, arithmetic"):
        sources.read_rows("packaged:sums")


def test_split_in_the_name_of_a_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("org/prefs", "org/prefs:main", "org/prefs#test", "org/prefs:main#train[:10%]"):
        (row,) = sources.read_rows(spec)
        assert (row.source, row.line) == (spec, 1)
    assert asked == [
        ("org/prefs", None, "train"),
        ("org/prefs", "main", "train"),
        ("org/prefs", None, "test"),
        ("org/prefs", "main", "train[:10%]"),
    ]
