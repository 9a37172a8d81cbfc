"""The plan of what was measured: what is kept survives, what is foreign is ignored, and without a plan nobody looks."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.plan import measured_plan, plan_file, plan_key
from fused_resnet.ops.plan.plan_file import Decision, NotAPlan
from fused_resnet.ops.route import routes

CPU = torch.device("cpu")
KEY = ((2, 8, 4, 4), "float32", "channels_last", (1, 0))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Empty folders in place of the user's and the package's own."""
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(plan_file, "SHIPPED_FOLDER", tmp_path / "shipped")
    measured_plan.reload()
    yield tmp_path
    monkeypatch.undo()
    measured_plan.reload()


def winner(key=KEY, op: str = "thing") -> str | None:
    return measured_plan.winner(op, key)


def test_what_is_recorded_is_known_here_and_in_the_next_process():
    assert winner() is None
    measured_plan.record("thing", KEY, "fast", {"fast": 1e-3, "slow": 2e-3}, heuristic="slow")
    assert winner() == "fast" and winner(op="other") is None and winner(("other",)) is None
    measured_plan.reload()  # as a new process
    assert winner() == "fast"
    found = measured_plan.decisions()["thing", KEY]
    assert found == Decision("fast", "slow", {"fast": 1e-3, "slow": 2e-3})
    measured_plan.record("thing", KEY, "faster", {})
    measured_plan.reload()
    assert winner() == "faster"
    assert len(list(measured_plan.plan_path().parent.glob("*.json"))) == 1


def test_a_winner_that_would_be_chosen_anyway_is_kept_and_says_nothing():
    measured_plan.record("thing", KEY, "usual", {}, heuristic="usual")
    assert ("thing", KEY) in measured_plan.decisions()
    for _ in range(2):
        assert winner() is None and not measured_plan.speaks
        assert measured_plan.describe() | {"path": ""} == {"path": "", "entries": 1, "differ": 0, "active": False}
        measured_plan.reload()


def test_describe_and_ignoring():
    measured_plan.record("thing", KEY, "fast", {})
    routes.keep(("a key",), "a route")
    assert measured_plan.describe()["active"] and measured_plan.describe()["entries"] == 1
    assert Path(measured_plan.describe()["path"]).is_file()
    with measured_plan.ignoring_measured_plan():
        with measured_plan.ignoring_measured_plan():
            assert winner() is None
        assert winner() is None and not measured_plan.speaks and not measured_plan.describe()["active"]
        assert ("a key",) not in routes.kept
    assert winner() == "fast"


def test_what_is_recorded_while_ignored_counts_afterwards():
    with measured_plan.ignoring_measured_plan():
        measured_plan.record("thing", KEY, "fast", {})
        assert winner() is None
    assert winner() == "fast"


def test_another_file_is_written_and_not_followed(tmp_path: Path):
    path = tmp_path / "deep" / "plan.json"
    measured_plan.record("thing", KEY, "fast", {}, path=path)
    assert winner() is None and not measured_plan.plan_path().exists()
    assert measured_plan.decisions(path=path)["thing", KEY].winner == "fast"


def test_the_users_plan_overrules_the_one_that_ships(folders: Path):
    condition = plan_file.condition_of(CPU)
    assert condition is not None
    shipped = plan_file.SHIPPED_FOLDER / plan_file.file_name(condition)
    plan_file.merge(shipped, condition, {("thing", KEY): Decision("shipped"), ("second", KEY): Decision("shipped")})
    assert winner() == "shipped"
    measured_plan.record("thing", KEY, "mine", {})
    measured_plan.reload()
    assert winner() == "mine" and winner(op="second") == "shipped"


GOOD = {"op": "thing", "key": [1], "winner": "fast", "heuristic": None, "seconds": {}}
DAMAGED = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "not text": lambda whole: b"\x80\x81\xff",
    "a pickle": lambda whole: pickle.dumps({"schema": 1}),
    "a list": lambda whole: b"[1, 2]",
    "another schema": lambda whole: whole.replace(b'"schema": 1', b'"schema": 2'),
    "another torch": lambda whole: whole.replace(torch.__version__.encode(), b"0.4.1"),
    "a winner of another type": lambda whole: whole.replace(b'"fast"', b"[7]"),
    "a key with null": lambda whole: whole.replace(b'"channels_last"', b"null"),
    "seconds in words": lambda whole: whole.replace(b"0.5", b'"half"'),
    "deep": lambda whole: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_that_names_it(damage):
    measured_plan.record("thing", KEY, "fast", {"fast": 0.5})
    path = measured_plan.plan_path()
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    measured_plan.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [winner() for _ in range(3)] == [None] * 3
    (warning,) = caught
    assert str(path) in str(warning.message) and warning.category is RuntimeWarning
    with pytest.raises(NotAPlan, match="plan.*json"):
        measured_plan.decisions(path=path)
    measured_plan.record("thing", KEY, "again", {})  # written anew
    measured_plan.reload()
    assert winner() == "again"


def test_a_plan_of_other_versions_or_threads_is_another_file(monkeypatch: pytest.MonkeyPatch):
    measured_plan.record("thing", KEY, "fast", {})
    for change in ({"torch": "9.9"}, {"fused_resnet": "9.9"}, {"threads": 77}, {"device": "another"}):
        other = (plan_file.condition_of(CPU) or {}) | change
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.setattr(plan_file, "condition_of", lambda device, other=other: other)
            measured_plan.reload()
            assert winner() is None
    measured_plan.reload()
    assert winner() == "fast"


def write_many(path: Path, name: str, count: int) -> None:
    condition = {"device": "any"}
    for index in range(count):
        plan_file.merge(path, condition, {(name, (index,)): Decision("fast")})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this platform")
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = plan_file.read

    def slow_read(path: Path, condition: dict) -> dict:
        found = read(path, condition)
        time.sleep(0.002)  # whoever may come in between, does
        return found

    monkeypatch.setattr(plan_file, "read", slow_read)
    context, path = multiprocessing.get_context("fork"), tmp_path / "plan.json"
    processes = [context.Process(target=write_many, args=(path, name, 15)) for name in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(read(path, {"device": "any"})) == 45
    assert sorted(found.name for found in tmp_path.iterdir() if found.is_file()) == [".plan.json.lock", "plan.json"]


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch):
    measured_plan.record("thing", KEY, "fast", {})
    path = measured_plan.plan_path()

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        measured_plan.record("thing", KEY, "other", {})
    monkeypatch.undo()
    assert json.loads(path.read_text())["decisions"][0]["winner"] == "fast"
    assert {each.suffix for each in path.parent.iterdir()} == {".json", ".lock"}


def test_without_a_plan_the_first_question_is_the_last_that_touches_a_disk(monkeypatch: pytest.MonkeyPatch):
    assert measured_plan.speaks  # nobody has looked yet
    assert winner() is None and not measured_plan.speaks

    def touched(*arguments: object) -> None:
        raise AssertionError("somebody looked again")

    for name in ("condition_of", "user_folder", "read", "file_name"):
        monkeypatch.setattr(plan_file, name, touched)
    monkeypatch.setattr(measured_plan, "_plan_of", touched)
    x = torch.ones(2, 8, 4, 4)
    for _ in range(3):
        assert winner() is None and measured_plan.level_for(x, x, ConvSettings()) is None
        assert not measured_plan.other_backend_for_passes(x, "native")


def test_a_plan_is_read_once(monkeypatch: pytest.MonkeyPatch):
    measured_plan.record("thing", KEY, "fast", {})
    measured_plan.reload()
    reads = []
    read = plan_file.read
    monkeypatch.setattr(plan_file, "read", lambda *arguments: reads.append(arguments) or read(*arguments))
    threads = [threading.Thread(target=winner) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winner() == "fast" and winner(("nothing",)) is None
    assert measured_plan.winner("thing", KEY, "cpu") == measured_plan.winner("thing", KEY, "cpu:0") == "fast"
    assert len(reads) == 1  # the user's; the package ships none


def test_devices_that_nothing_is_measured_on():
    measured_plan.record("thing", KEY, "fast", {})
    assert measured_plan.winner("thing", KEY, "meta") is None
    with pytest.raises(ValueError, match="^device must be a CPU or a GPU that is here; got 'meta'$"):
        measured_plan.record("thing", KEY, "fast", {}, device="meta")


@pytest.mark.parametrize("key", ["text", (None,), ((1, None),), ({},), (torch.float32,)], ids=str)
def test_a_key_that_json_cannot_hold_is_refused(key):
    with pytest.raises(TypeError, match="^key must be"):
        measured_plan.record("thing", key, "fast", {})


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert plan_file.user_folder() == tmp_path / "cache" / "plans"
    monkeypatch.delenv(plan_file.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plan_file.user_folder() == tmp_path / "xdg" / "fused_resnet" / "plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in plan_file.user_folder().parents


def test_the_key_of_an_op_tells_apart_what_is_another_pass_and_nothing_else():
    x, vector = torch.ones(2, 8, 4, 4), torch.ones(8)
    nhwc = x.to(memory_format=torch.channels_last)

    def key(x=nhwc, residual=None, weight=vector, relu=True):
        return plan_key.key_of("bn_apply", (x, vector, vector, weight, None, residual, relu))

    assert key() == key(weight=None) == key(relu=False)
    assert len({key(), key(x), key(nhwc.bfloat16()), key(nhwc[:1]), key(residual=nhwc)}) == 5

    def conv(stride=1, groups=1, residual=None, relu=True, scale=None):
        weight = torch.ones(8, 8 // groups, 3, 3)
        settings = ([stride] * 2, [1, 1], [1, 1], groups, relu)
        return plan_key.key_of("conv_bn_act", (nhwc, weight, scale, None, residual, *settings))

    assert conv() == conv(relu=False) == conv(scale=vector)
    assert len({conv(), conv(stride=2), conv(groups=2), conv(residual=nhwc)}) == 4
    plan_file.check_key(conv())


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "/dev/null/x", "forbidden"])
def test_a_folder_that_makes_no_sense_is_no_plan_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, name: str):
    def forbidden() -> Path:
        raise PermissionError(13, "Permission denied")

    if name == "forbidden":
        monkeypatch.setattr(plan_file, "user_folder", forbidden)
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, name)
    measured_plan.reload()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            assert measured_plan.winner("bn_apply", (1, 2)) is None
    assert len(told) == (name != "/dev/null/x")
