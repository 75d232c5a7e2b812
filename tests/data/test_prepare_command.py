"""The command line, as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from dtron.__main__ import main
from dtron.data import prepare as prepare_module
from dtron.data.shards import open_store
from dtron.data.tokenizer import read_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i}" + " and so on" * (i % 40) for i in range(200)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return tmp_path / "texts.jsonl"


def arguments(source, out, *more):
    return ["prepare", str(source), "--text-column", "body", "--tokenizer", "bpe:300", "--out", str(out), *more]


def dtron(*args, home):
    """`python -m dtron` with a home folder of its own, where nothing may be written."""
    home.mkdir(exist_ok=True)
    settings = os.environ | {"HOME": str(home)}
    settings.pop("HF_HOME", None)
    command = [sys.executable, "-m", "dtron", *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert list(home.iterdir()) == []
    return result


def test_prepare_then_show(source, tmp_path, capsys):
    out = tmp_path / "out"
    result = dtron(*arguments(source, out, "--processes", "2", "--shard-tokens", "900"), home=tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert "prepared " in result.stdout and "200 documents" in result.stdout and f"--show {out}" in result.stdout
    store = open_store(out)
    assert store.n_documents == 200 and len(store.shards) > 2
    assert main(["prepare", "--show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"200 documents, {store.n_tokens:,} tokens (uint16, vocabulary {store.vocab_size})" in shown
    assert "verified" in shown and f"{len(store.shards)} shards" in shown
    for number in (0, 100, 199):
        start, stop = store.document(number)
        assert f"--- document {number}: {stop - start} tokens\n{TEXTS[number]}"[:60] in shown
    rows = [line.split() for line in shown.splitlines() if line.endswith("#")]
    assert sum(int(row[3]) for row in rows) == 200
    lengths = [length for i in range(len(store.shards)) for length in store.document_lengths(i)]
    for low, _, high, count, _ in rows:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)


def test_output_may_be_cut_short(source, tmp_path):
    assert main(arguments(source, tmp_path / "out", "--processes", "1")) == 0
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dtron", "prepare", "--show", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")


def test_show_reports_damage(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(source, out, "--processes", "1")) == 0
    data = bytearray((out / "shard-00000.tokens").read_bytes())
    data[-1] ^= 1
    (out / "shard-00000.tokens").write_bytes(data)
    assert main(["prepare", "--show", str(out)]) == 1
    assert "error: " in (said := capsys.readouterr()).err and "shard-00000.tokens is damaged" in said.err
    assert "verified" not in said.out


def test_same_command_again_resumes_or_is_done(source, tmp_path):
    """Killed with all its processes, then given again; then once more."""
    out, home = tmp_path / "out", tmp_path / "home"
    source.write_text(source.read_text() * 100)
    command = arguments(source, out, "--processes", "2", "--shard-tokens", "7000")
    child = subprocess.Popen([sys.executable, "-m", "dtron", *command], cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 60
    while not (out / "shard-00003.tokens").exists():
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    again = dtron(*command, home=home)
    assert again.returncode == 0 and "resuming after shard" in again.stdout, again
    assert open_store(out).n_documents == 20_000
    done = dtron(*command, home=home)
    assert done.returncode == 0 and "prepared already" in done.stdout


def test_the_embedded_corpus_by_its_name(tmp_path, capsys):
    for wrong in (["--split", "test"], ["--subset", "x"]):
        assert main(["prepare", "stdlib", "--tokenizer", "bpe:300", "--out", str(tmp_path / "out"), *wrong]) == 1
        assert "stdlib has the splits train and validation" in capsys.readouterr().err
    out, split = str(tmp_path / "out"), ["--split", "validation", "--processes", "1"]
    assert main(["prepare", "stdlib", "--tokenizer", "bpe:300", "--out", out, *split]) == 0
    store = open_store(out)
    assert 10 < store.n_documents < 200 and store.source["name"] == "the standard library (validation)"


@pytest.mark.parametrize(
    "args,code,said",
    [
        (["prepare", "/nowhere/data", "--tokenizer", "bpe:300", "--out", "{out}"], 1, "/nowhere/data"),
        (["prepare", "{source}", "--tokenizer", "/nowhere", "--out", "{out}"], 1, "--tokenizer = '/nowhere'"),
        (["prepare", "{source}", "--tokenizer", "bpe:300", "--out", "{out}"], 1, "'body'"),  # the column there is
        (["prepare", "--show", "{out}"], 1, "manifest.json is missing"),
        (["prepare", "--show", "{out}", "--out", "x"], 2, "--show takes no"),
        (["prepare", "{source}", "--out", "{out}"], 2, "--tokenizer and --out are required"),
        (["prepare", "{source}", "--processes", "0"], 2, "0: expected 1 or more"),
        ([], 2, "COMMAND"),
    ],
)
def test_mistakes_are_reported_in_one_line(source, tmp_path, capsys, args, code, said):
    args = [arg.format(source=source, out=tmp_path / "out") for arg in args]
    try:
        result = main(args)
    except SystemExit as exit_:
        result = exit_.code
    assert result == code and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_needs_neither_torch_nor_the_hubs_libraries(source, tmp_path):
    absent = ["torch", "datasets", "transformers", "torchdata", "pyarrow"]
    code = (
        "import sys\n"
        f"for name in {absent}: sys.modules[name] = None\n"
        "from dtron.__main__ import main\n"
        f"raise SystemExit(main({arguments(source, tmp_path / 'out', '--processes', '1')!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_it_is_installed_as_dtron():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert '[project.scripts]\ndtron = "dtron.__main__:main"\n' in pyproject
    for script in entry_points(group="console_scripts", name="dtron"):  # where the installation is newer than the line
        assert script.load() is main


def test_bench_compares_the_same_tokens(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = [sys.executable, "scripts/bench/prepare.py", "--file", str(tmp_path / "texts.jsonl")]
    command += ["--tokenizer", "bpe:300", "--processes", "2", "--rounds", "1"]
    result = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert result["tokens"] > 1000 and result["bare"] > 0 and len(result["ratios"]) == 1
    assert result["ratio"] == pytest.approx(result["dtron"] / result["bare"], rel=0.2)


def test_out_inside_the_source_is_refused(source, tmp_path, capsys):
    assert main(arguments(source.parent, tmp_path / "out" / "deep")) == 1
    assert "is inside" in capsys.readouterr().err and os.listdir(tmp_path) == ["texts.jsonl"]


def test_mistyped_tokenizer_is_reported_at_once(source, tmp_path, capsys):
    for name, says in (
        (str(tmp_path / "nope"), "is no local file or folder"),
        ("bpe:", "expected bpe:N with the number of tokens"),
        ("./nope", "is no local file or folder"),
    ):
        command = ["prepare", str(source), "--text-column", "body", "--tokenizer", name, "--out", str(tmp_path / "out")]
        began = time.monotonic()
        assert main(command) == 1 and time.monotonic() - began < 5  # no retries over a network
        said = capsys.readouterr().err
        assert f"--tokenizer = {name!r}" in said and says in said


def prepared(source, out, capsys, *more):
    code = main(arguments(source, out, "--processes", "1", *more))
    return code, capsys.readouterr()


def test_bad_documents_are_skipped_and_counted(source, tmp_path, capsys, monkeypatch):
    """Refused at the first; given again to skip them, it resumes after what is finished, and counts them all."""
    (tmp_path / "tokenizer").mkdir()
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer")
    monkeypatch.setattr(prepare_module, "BATCH", 150)
    lines, out = source.read_text().splitlines(), tmp_path / "out"
    lines[150] = '{"body": null}'
    lines[190:190] = ['{"body": "\\ud83d"}']
    source.write_text("\n".join(lines))
    resumable = [source, out, capsys, "--tokenizer", str(tmp_path / "tokenizer"), "--shard-tokens", "500"]
    code, said = prepared(*resumable)
    assert code == 1 and f"error: {source}, line 151 holds null" in said.err and "--on-error skip" in said.err
    first = (out / "shard-00000.tokens").stat().st_ino
    code, said = prepared(*resumable, "--on-error", "skip")
    assert code == 0 and "resuming after shard" in said.out
    assert f"skipped 2 bad documents, the first: {source}, line 151 " in said.out
    assert (out / "shard-00000.tokens").stat().st_ino == first
    assert open_store(out).n_documents == 199 and open_store(out).skipped == 2
    lines[3:3] = ["not JSON", *['{"body": 1}'] * 12]
    source.write_text("\n".join(lines))
    code, said = prepared(source, tmp_path / "all", capsys, "--on-error", "skip")
    assert code == 0 and said.out.count(f"skipped: {source}, line ") == 10 and "line 13 holds int" in said.out
    assert f"skipped 15 bad documents, the first: {source}, line 4 is not JSON" in said.out
    assert main(["prepare", "--show", str(tmp_path / "all")]) == 0
    assert "bad documents that were skipped: 15" in capsys.readouterr().out
    source.write_text('{"body": 1}\n' * 3)
    command = ["prepare", str(source), "--tokenizer", str(out), "--out", str(tmp_path / "none"), "--on-error", "skip"]
    assert main(command) == 1 and "and 3 bad ones, the first" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def texts_in(folder):
    store, encoder = open_store(folder), read_tokenizer(str(folder), folder, "")
    spans = (store.document(i) for i in range(store.n_documents))
    return [encoder.decode(store.read(start, stop - 1).tolist()) for start, stop in spans]


def test_a_share_is_held_out_in_the_same_command(source, tmp_path, capsys):
    """Each text is on one side, also one that comes twice; the tokenizer has not seen those held out."""
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS * 2))
    code, said = prepared(source, tmp_path / "out", capsys, "--held-out", "10%")
    assert code == 0 and f"validation.dataset = {tmp_path}/out-validation" in said.out
    train, held_out = texts_in(tmp_path / "out"), texts_in(tmp_path / "out-validation")
    assert sorted(train + held_out) == sorted(TEXTS * 2) and not set(train) & set(held_out)
    assert train == [text for text in TEXTS * 2 if text in train] and 20 < len(held_out) < 60
    fingerprints = {open_store(tmp_path / name).tokenizer_fingerprint for name in ("out", "out-validation")}
    assert fingerprints == {train_bpe(train, 300).fingerprint}
    (tmp_path / "again").mkdir()
    code, said = prepared(source, tmp_path / "again" / "out", capsys, "--held-out", "0.1", "--shard-tokens", "900")
    assert texts_in(tmp_path / "again" / "out-validation") == held_out
    code, said = prepared(source, tmp_path / "out", capsys, "--held-out", "10%")
    assert code == 0 and said.out.count("prepared already") == 2
    code, said = prepared(source, tmp_path / "out", capsys, "--held-out", "20%")
    assert code == 1 and "holds other data; it has another source" in said.err
    code, said = prepared(source, tmp_path / "few", capsys, "--held-out", "0.001%")
    assert code == 1 and "(0.001% of its documents) is empty" in said.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("few")]


@pytest.mark.parametrize("share", ["0%", "100%", "5", "1/10", "-1%"])
def test_a_held_out_share_is_a_share(source, tmp_path, capsys, share):
    with pytest.raises(SystemExit):
        main(arguments(source, tmp_path / "out", f"--held-out={share}"))
    assert "expected a share of the documents between 0 and 100%, such as 1%" in capsys.readouterr().err
