"""The command line does the main job, prints what can be read anywhere, and fails in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf
from typer.testing import CliRunner, Result

from mamba_trace import MambaTrace, __version__
from mamba_trace.cli import PROMPT, SOURCE, app, main
from mamba_trace.patching import PatchGrid, attribution_grid, log_prob, logit_diff, patch_grid
from mamba_trace.sites import FAMILIES, SITES, rows


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", **environment}).invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


# -- patch -------------------------------------------------------------------------------------------------


def test_patch_without_options_is_the_seed_experiment(tmp_path: Path) -> None:
    out = tmp_path / "grid.json"
    result = run("patch", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    grid = PatchGrid.load(out)
    assert f"prompt       {PROMPT}" in result.stdout
    assert f"source       {SOURCE}" in result.stdout
    assert "model        demo" in result.stdout
    assert f"of prompt    {grid.prompt_metric:+.4f}" in result.stdout
    assert f"of source    {grid.source_metric:+.4f}" in result.stdout
    assert "corrupted" not in result.stdout
    assert f"wrote {out}" in result.stdout
    rows = re.findall(r"^layer (\d) +(.*)$", result.stdout, flags=re.MULTILINE)
    assert [int(layer) for layer, _ in rows] == list(range(len(grid.values)))
    for values, (_, cells) in zip(grid.normalized().tolist(), rows, strict=True):
        shown = [0.0 if cell == "·" else float(cell) for cell in cells.split()]
        assert shown == pytest.approx(values, abs=0.0051)
    assert "patching h" in result.stderr


def test_patch_takes_other_prompts_sites_and_answers(tmp_path: Path) -> None:
    out = tmp_path / "grid.json"
    options = ("--site", "hook_resid_pre", "--prompt", SOURCE, "--source", PROMPT, "--batch-size", "4", "-q")
    result = run("patch", *options, "--answer", " Shelby", "--wrong", " Emma", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    grid = PatchGrid.load(out)
    assert grid.site == "resid_pre"
    assert grid.prompt_metric > 0 > grid.source_metric
    assert grid.metric == "logit of ' Shelby' minus logit of ' Emma'"
    assert "patching" not in result.stderr


def test_patch_draws_several_sites_on_one_page_and_says_how_well_first_order_does(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("patch", "--site", "h, resid_pre", "--attribution", "-q", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    headings = ["h", "h, to first order", "resid_pre", "resid_pre, to first order"]
    assert [line for line in result.stdout.splitlines() if line in headings] == headings
    correlations = re.findall(r"^correlation with patching: ([+-]\d\.\d{4})$", result.stdout, re.MULTILINE)
    model = MambaTrace.demo()
    metric = logit_diff(model, " Emma", " Shelby")
    for site, shown in zip(("h", "resid_pre"), correlations, strict=True):
        patched = patch_grid(model, PROMPT, SOURCE, site, metric, progress=False)
        expected = attribution_grid(model, PROMPT, SOURCE, site, metric).correlation(patched)
        assert float(shown) == pytest.approx(expected, abs=1e-3)
    page = out.read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") >= 4
    assert "<h2>resid_pre, to first order</h2>" in page


def test_patch_prints_json_of_another_metric_in_another_dtype() -> None:
    options = ("--metric", "log-prob", "--dtype", "float64", "--device", "cpu", "--window", "2")
    result = run("patch", "--site", "conv,norm", "--json", "-q", *options)
    content = json.loads(result.stdout)
    assert [grid["site"] for grid in content["grids"]] == ["conv", "norm"]
    model = MambaTrace.demo(dtype=torch.float64)
    for found in content["grids"]:
        grid = patch_grid(model, PROMPT, SOURCE, found["site"], log_prob(model, " Emma"), window=2, progress=False)
        assert (found["metric"], found["window"]) == ("log probability of ' Emma'", 2)
        assert found["positions"] == grid.labels
        torch.testing.assert_close(torch.tensor(found["values"], dtype=torch.float64), grid.values)
        assert grid.values.dtype == torch.float64


def test_patch_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    first = run("patch", "--site", "h,y", "--keep", str(tmp_path), "-q", "--json")
    assert {path.name for path in tmp_path.iterdir()} == {"h", "y"}
    again = run("patch", "--site", "h,y", "--keep", str(tmp_path), "-q", "--json")
    assert first.stdout == again.stdout
    assert "holds the cells of another grid" in refused("patch", "-q", "--keep", str(tmp_path / "y"))


def test_patch_warns_of_an_answer_without_its_space() -> None:
    result = run("patch", "--answer", "Emma", "-q", "--site", "embeddings")
    assert "warning: 'Emma' and ' Emma' are different tokens" in result.stderr
    assert "logit of 'Emma' minus" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--site", "resid_prae"), "no site is called 'resid_prae'; did you mean resid_pre"),
        (("--site", "h_start"), "has no positions"),
        (
            ("--site", "h[5]"),
            "a grid takes a site. h patches every layer and position. A grid patches one of",
        ),
        (("--site", "layers[1].ssm.h"), "no site is called 'layers[1].ssm.h': that is one place"),
        (("--out", "grid.pdf"), "grid.pdf: a result is saved as .html, .png, .json, .safetensors, not .pdf"),
        (("--site", "h,y", "--out", "grid.png"), "grid.png: several grids are saved as one page, .html"),
        (("--site", "h,resid_prae"), "no site is called 'resid_prae'; did you mean resid_pre"),
        (("--site", " , "), "no site is named"),
        (("--window", "2", "--attribution"), "--attribution estimates patches of one layer"),
        (("--window", "9"), "window=9: this model has 8 layers"),
        (("--answer", " Emma Shelby"), "is 2 tokens"),
        (("--answer", " Shelby"), "answer and wrong are both ' Shelby'"),
        (("--source", SOURCE + " the"), "prompt has 15 tokens and source 16"),
        (("--kernels", "magic"), "no backend is called 'magic'"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(options: tuple[str, ...], said: str) -> None:
    assert said in refused("patch", "-q", *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "zz"), "error: --device 'zz' is no device. There are "),
        (("--device", "disk"), "error: --device 'disk' is no device. There are "),
        (("--device", "-1"), "error: --device '-1' is no device. There are "),
        (("--device", "cuda:99"), "error: --device 'cuda:99' cannot be used on this machine. There are "),
        (("--device", "cuda:99", "--model", "no/such"), "error: --device 'cuda:99' cannot be used"),
        (("--model", ""), "error: the name of the checkpoint is empty"),
        (("--model", "/no/such"), "error: no such folder: /no/such"),
        (("--model", __file__), "is a file; give the folder that it is in"),
        (("--prompt", "Emma \udcff"), "error: --prompt is no text in UTF-8: 'Emma \\udcff'"),
        (("--answer", "\udcff"), "error: --answer is no text in UTF-8"),
    ],
)
def test_hostile_values_are_refused_in_one_sentence(options: tuple[str, ...], said: str) -> None:
    words = refused("patch", "-q", *options)
    assert said in words
    assert words.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    words = refused("patch", "-q", "--device", "cuda")
    assert words.startswith("error: --device 'cuda' cannot be used on this machine. There are cpu, or it is auto")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("patch", "--metric", "zz"), "'zz' is not one of"),
        (("patch", "--dtype", "zz"), "'zz' is not one of"),
        (("patch", "--window", "0"), "--window"),
        (("patch", "--layers", "3"), "--layers"),
        (("patch", "surplus"), "surplus"),
        (("zz",), "zz"),
    ],
)
def test_options_that_there_are_none_of(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert said in result.stderr


def test_the_system_s_errors_are_one_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mamba_trace.cli.load_model", full)
    assert refused("patch", "-q") == "error: [Errno 28] No space left on device\n"


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mamba_trace.cli.load_model", load)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "gone" / "grid.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    before = sorted(tmp_path.iterdir())
    for name in ("folder.json", "link.json", "loop.json", "x" * 300 + ".json"):
        words = refused("patch", "-q", "--out", str(tmp_path / name))
        assert f"{name} cannot be written: " in words
    assert "there is no folder" in refused("patch", "-q", "--out", str(tmp_path / "gone" / "grid.json"))
    assert sorted(tmp_path.iterdir()) == before


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mamba-trace {__version__}\n")


def test_an_error_found_only_by_running_is_one_message_too() -> None:
    result = run("patch", "-q", "--source", PROMPT)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: prompt and source have the same metric")


def test_python_m_writes_the_page_and_fails_without_a_traceback(tmp_path: Path) -> None:
    done = python("-m", "mamba_trace", "patch", "--out", "grid.html", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Plotly.newPlot" in (tmp_path / "grid.html").read_text(encoding="utf-8")
    assert "\x1b[" not in done.stdout, "no colours where nobody sees them"
    failed = python("-m", "mamba_trace", "patch", "--model", "no/such/folder", cwd=tmp_path)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert re.search(r"^error: .*no/such/folder", failed.stderr, flags=re.MULTILINE)


# -- sites and help ----------------------------------------------------------------------------------------


def test_info_says_what_runs_and_how_to_get_the_rest() -> None:
    from mamba_trace.scan.cuda import INSTALL_CONV, INSTALL_SCAN
    from mamba_trace.scan.dispatch import BACKENDS

    text = run("info").stdout
    for name in BACKENDS:
        assert re.search(rf"^  {name} +(yes|no: .+)$", text, re.MULTILINE)
    assert INSTALL_SCAN in text
    assert INSTALL_CONV in text
    assert "layers 0-7: cpu conv with SiLU; cpu scan with softplus, D and gate" in text


def test_info_as_json() -> None:
    found = json.loads(run("info", "--json", "--kernels", "reference").stdout)
    scans = {one["backend"]: one["scan"] for one in found["kernels"]}
    assert scans["reference"] is scans["cpu"] is None
    assert "pip install" in scans["cuda"]
    calls = [[(call["function"], call["backend"]) for call in layer["calls"]] for layer in found["layers"]]
    assert calls == [[("causal_conv", "PyTorch"), ("gated_scan", "reference")]] * 8


def test_sites_lists_the_table() -> None:
    lines = run("sites").stdout.splitlines()
    assert re.fullmatch(r"path +Mamba-1, Falcon-Mamba +Mamba-2 +hybrids +hook name +meaning", lines[0])
    table = [re.split(r" {2,}", line) for line in lines[1:-2]]
    begin = [row[:5] for row in table]
    assert ["layers[l].ssm.conv", "B L E", "B L E", "B L E", "blocks.l.hook_conv"] in begin
    assert ["layers[l].ssm.h[p]", "B E N", "B H P N", "as its SSM", "blocks.l.hook_h.p"] in begin
    assert ["layers[l].ssm.h", "B L E N", "B L H P N", "as its SSM", "(none)"] in begin
    assert ["layers[l].ssm.B_in", "(none)", "B L G N", "as its SSM", "blocks.l.hook_B_in"] in begin
    assert ["layers[l].attn.q", "(none)", "(none)", "B L Q W", "blocks.l.attn.hook_q"] in begin
    shown = [
        [row.path, *(row.shape(family) or "(none)" for family in FAMILIES), row.hook or "(none)", row.meaning]
        for row in rows()
    ]
    assert [row[:3] + row[4:] for row in table if row[1:3] != ["(none)", "(none)"]] == shown
    assert [row[0] for row in table] == [row.path for row in rows(hybrid=None)]
    assert "B batch, L positions, D d_model" in lines[-1]


@pytest.mark.parametrize("name", ["demo-mamba2", "demo-hybrid"])
def test_patch_of_the_others_that_ship(name: str, tmp_path: Path) -> None:
    found = run("patch", "--model", name, "--out", str(tmp_path / "heatmap.html"), "--quiet")
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "heatmap.html").stat().st_size > 1000
    assert "Emma" in found.stdout


def test_sites_of_one_model_are_those_that_it_has(tmp_path: Path) -> None:
    make_hf(model_type="mamba2").save_pretrained(tmp_path)
    lines = run("sites", "--model", str(tmp_path)).stdout.splitlines()
    assert re.fullmatch(r"path +Mamba-2 +hook name +meaning", lines[0])
    assert any(re.match(r"layers\[l\]\.ssm\.delta +B L H ", line) for line in lines)
    of_demo = json.loads(run("sites", "--model", "demo", "--json").stdout)
    assert [row["path"] for row in of_demo] == [row.path for row in rows("selective")]
    assert of_demo[-1]["shape"] == {"Mamba-1": "B L V"}
    make_hf(model_type="falcon_mamba").save_pretrained(tmp_path)
    lines = run("sites", "--model", str(tmp_path)).stdout.splitlines()
    assert re.fullmatch(r"path +Falcon-Mamba +hook name +meaning", lines[0])


def test_sites_as_json_is_in_execution_order() -> None:
    rows = json.loads(run("sites", "--json").stdout)
    names = [row["path"].rpartition(".")[2] for row in rows]
    assert [name for name in names if name != "h[p]"] == [site.name for site in SITES]
    assert {row["path"]: row["shape"] for row in rows}["layers[l].attn.z"] == {
        "Mamba-1": None,
        "Falcon-Mamba": None,
        "Mamba-2": None,
        "hybrids": "B L Q W",
    }
    assert rows[1] == {
        "path": "layers[l].resid_pre",
        "shape": {"Mamba-1": "B L D", "Falcon-Mamba": "B L D", "Mamba-2": "B L D", "hybrids": "B L D"},
        "hook": "blocks.l.hook_resid_pre",
        "meaning": "residual stream into the block",
    }


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from mamba_trace.cli import app\n"
        "app(['patch', '--help'], standalone_mode=False)\n"
        "app(['sites'], standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_main_is_the_app(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mamba-trace", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert "Usage: mamba-trace" in help_text
    assert all(command in help_text for command in ("patch", "sites"))


# -- port --------------------------------------------------------------------------------------------------


def test_port_writes_the_script(tmp_path: Path) -> None:
    script, ported = tmp_path / "script.py", tmp_path / "ported.py"
    script.write_bytes(b"import mamba_lens  # why\r\nx = 1\r\n")
    assert run("port", str(script), "--out", str(ported)).exit_code == 0
    assert ported.read_bytes() == b"from mamba_trace import mamba_lens  # why\r\nx = 1\r\n"
    assert script.read_bytes().startswith(b"import mamba_lens")
    for arguments, words in (
        ((str(script), "--out", str(tmp_path / "ported.txt")), "ported.txt"),
        (("blocks.3.hook_h.5", "--out", str(ported)), "--out writes a script"),
    ):
        result = run("port", *arguments)
        assert result.exit_code == 2
        assert words in result.stderr


def test_port_says_one_name() -> None:
    result = run("port", "blocks.3.hook_h.5")
    assert (result.exit_code, result.stdout) == (0, "model.layers[3].ssm.h[5].output\n")
    assert json.loads(run("port", "hook_embed", "--json").stdout) == {
        "found": "hook_embed",
        "becomes": "model.embeddings.output",
    }
    assert run("port", "blocks.3.attn.hook_z").stdout == "model.layers[3].attn.z.output (in hybrids)\n"
    assert json.loads(run("port", "blocks.3.attn.hook_z", "--json").stdout)["note"] == "in hybrids"


def test_port_writes_a_script_that_is_not_complete_and_says_so(tmp_path: Path) -> None:
    script, ported = tmp_path / "script.py", tmp_path / "ported.py"
    script.write_bytes(b"# coding: latin-1\nids = model.to_tokens('\xe9')\nmodel.blocks[0].attn.W_Q\n")
    result = run("port", str(script), "--out", str(ported))
    assert result.exit_code == 1
    assert "the ported script is not complete: 1 line of" in result.stderr
    first, second, comment, last = ported.read_bytes().splitlines()
    assert (first, second) == (b"# coding: latin-1", b"ids = model.to_tokens('\xe9')")
    assert comment.startswith(b"# mamba-trace port: model.blocks[0].attn: ")
    assert last == b"model.blocks[0].attn.W_Q"


def test_port_prints_the_traces_of_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from mamba_lens import HookedMamba  # MambaLens\n"
        'a = model.run_with_hooks(["Hi"], fwd_hooks=[("blocks.0.hook_y", lambda y, hook: y * 2)])\n'
        'c["blocks.0.hook_h.3"]\nc["blocks.0.hook_q"]\nmodel.to_tokens(x)\n'
    )
    result = run("port", str(script))
    assert result.exit_code == 1, result.stderr
    assert "is not complete: 1 line of" in result.stderr
    trace = (
        '# line 2\nwith model.trace(model.to_tokens(["Hi"], prepend_bos=True)):\n'
        "    model.layers[0].ssm.y.output = model.layers[0].ssm.y.output * 2\n"
        "    a = model.lm_head.output.save()\n"
    )
    assert trace in result.stdout
    assert '    3  "blocks.0.hook_h.3"\n       -> model.layers[0].ssm.h[3].output' in result.stdout
    assert "    5  model.to_tokens(x)\n       -> model.to_tokens(x) (the same here)" in result.stdout
    assert 'Cannot be ported:\n    4  "blocks.0.hook_q"' in result.stdout
    data = json.loads(run("port", str(script), "--json").stdout)
    assert [one["line"] for one in data["findings"]] == [1, 2, 2, 2, 3, 5]
    assert data["problems"][0]["line"] == 4
    assert data["script"].startswith("from mamba_trace.mamba_lens import HookedMamba  # MambaLens\na = ")


def test_port_refuses_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("a = (")
    assert "gone.py cannot be read: No such file" in refused("port", str(tmp_path / "gone.py"))
    assert "broken.py, line 1 is no Python" in refused("port", str(tmp_path / "broken.py"))
    assert "did you mean blocks.3.hook_delta" in refused("port", "blocks.3.hook_deltaa")
    assert "cannot be read: embedded null byte" in refused("port", "\0.py")
    assert "no site is called" in refused("port", "x" * 5000)
    (tmp_path / "folder.py").mkdir()
    assert "folder.py cannot be read: Is a directory" in refused("port", str(tmp_path / "folder.py"))


def test_port_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mamba_trace.cli import app\n"
        "app(['port', 'blocks.0.hook_y'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == ["model.layers[0].ssm.y.output", "False"], done.stderr
