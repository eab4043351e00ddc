"""The queue runs its items in order, in slices, never twice, and never what it cannot afford."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("gpu_queue", Path(__file__).parent.parent / "benchmarks" / "gpu_queue.py")
assert spec is not None and spec.loader is not None
gpu_queue = importlib.util.module_from_spec(spec)
sys.modules["gpu_queue"] = gpu_queue
spec.loader.exec_module(gpu_queue)


def item(name, **settings):
    return gpu_queue.Item(name, "", lambda plan: [name], **settings)


@dataclasses.dataclass
class Machine:
    """Runs an item in so many minutes of its own clock; a sliced one stops when its slice is over."""

    work: dict[str, float]
    broken: tuple[str, ...] = ()
    now: float = 0.0
    ran: list[str] = dataclasses.field(default_factory=list)

    def run(self, entry, arguments, minutes):
        self.ran.append(entry.name)
        assert arguments == [entry.name]
        spent = min(self.work[entry.name], minutes) if entry.sliced else self.work[entry.name]
        self.now += 60 * spent
        self.work[entry.name] -= spent
        if entry.name in self.broken:
            return 3
        return gpu_queue.STOPPED_EARLY if self.work[entry.name] > 1e-9 else 0

    def slice(self, items, workdir, minutes):
        return gpu_queue.run_queue(items, workdir, minutes, self.run, clock=lambda: self.now)


TRAIN = item("train", sliced=True, minutes=20)
REPORT = item("report", needs=("train",), minutes=4, result=lambda plan: {"value": 0.5})
SPEED = item("speed", minutes=2)


def test_a_long_item_goes_on_in_the_next_slice_and_others_follow(tmp_path):
    machine = Machine({"train": 20.0, "report": 3.0, "speed": 1.0})
    items = (TRAIN, REPORT, SPEED)
    assert machine.slice(items, tmp_path, 9) == gpu_queue.STOPPED_EARLY
    assert machine.slice(items, tmp_path, 9) == gpu_queue.STOPPED_EARLY
    assert machine.ran == ["train", "train"]
    assert machine.slice(items, tmp_path, 9) == 0
    assert machine.ran == ["train", "train", "train", "report", "speed"]
    state = gpu_queue.read_state(tmp_path)
    assert state["train"]["slices"] == 3 and state["train"]["seconds"] == 1200
    assert state["report"] == {"status": "finished", "slices": 1, "seconds": 180.0, "result": {"value": 0.5}}
    assert machine.slice(items, tmp_path, 9) == 0  # nothing is left to do
    assert len(machine.ran) == 5


def test_an_item_that_cannot_be_cut_waits_for_a_slice_with_room(tmp_path):
    machine = Machine({"train": 6.0, "report": 4.0, "speed": 1.0})
    items = (TRAIN, REPORT, SPEED)
    assert machine.slice(items, tmp_path, 9) == gpu_queue.STOPPED_EARLY
    assert machine.ran == ["train"]  # 3 minutes are left, the report takes 4
    assert machine.slice(items, tmp_path, 9) == 0
    assert machine.ran == ["train", "report", "speed"]


def test_a_failed_item_is_tried_again_and_holds_back_only_what_needs_it(tmp_path):
    machine = Machine({"train": 1.0, "report": 1.0, "speed": 1.0}, broken=("train",))
    items = (TRAIN, REPORT, SPEED)
    assert machine.slice(items, tmp_path, 9) == 1
    assert machine.ran == ["train", "speed"]
    assert gpu_queue.read_state(tmp_path)["train"]["status"] == "failed with exit code 3"
    machine.broken, machine.work["train"] = (), 1.0
    assert machine.slice(items, tmp_path, 9) == 0
    assert machine.ran == ["train", "speed", "train", "report"]


def test_every_item_stands_after_what_it_needs():
    names = [entry.name for entry in gpu_queue.ITEMS]
    assert len(set(names)) == len(names)
    for position, entry in enumerate(gpu_queue.ITEMS):
        assert set(entry.needs) <= set(names[:position])
        assert entry.sliced or entry.minutes < 9
    assert names.index("shapes") < names.index("alignment_iid") < names.index("plain") < names.index("speed")


def options(command):
    return dict(argument.split("=", 1) for argument in command if "=" in argument)


def test_the_control_has_the_budget_of_the_model_and_only_the_plain_row(tmp_path):
    plan = gpu_queue.Plan(tmp_path, False, {"pace": {"clips_per_s": 1024.0}})
    commands = {entry.name: options(entry.command(plan)) for entry in gpu_queue.ITEMS if entry.sliced}
    steps = round(1024 * 60 * gpu_queue.DIFFUSION_MINUTES / gpu_queue.BATCH_SIZE)
    assert commands["shapes"]["--config.train.num_steps"] == commands["plain"]["--config.train.num_steps"] == str(steps)
    changed = {name for name in commands["plain"] if commands["plain"][name] != commands["shapes"].get(name)}
    assert changed == {"--workdir"} | {f"--config.diffusion.mixture.{row}" for row in gpu_queue.PLAIN_ROW}
    assert [row for row, weight in gpu_queue.PLAIN_ROW.items() if weight] == ["text_to_video"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_setting_of_every_item_exists_in_its_recipe(tmp_path, dry_run):
    plan = gpu_queue.Plan(tmp_path, dry_run, {"pace": {"clips_per_s": 1.0}})
    for entry in gpu_queue.ITEMS:
        given = options(entry.command(plan))
        if "--config" not in given:
            continue
        path = gpu_queue.ROOT / given["--config"]
        recipe_spec = importlib.util.spec_from_file_location("recipe_file", path)
        module = importlib.util.module_from_spec(recipe_spec)
        recipe_spec.loader.exec_module(module)
        recipe = module.get_config()
        for name in given:
            if name.startswith("--config."):
                node = recipe
                for part in name.removeprefix("--config.").split("."):
                    node = node[part]  # raises for an unknown one
        if not dry_run and entry.name in ("shapes", "plain"):
            assert recipe.data.batch_size == gpu_queue.BATCH_SIZE


def test_results_are_read_from_what_the_items_write(tmp_path):
    plan = gpu_queue.Plan(tmp_path, False, {"alignment_iid": {"all": 0.8}})
    (tmp_path / "pace").mkdir()
    rows = [{"step": 50, "clips_per_s": 10.0}, {"step": 100, "clips_per_s": 400.0}, {"step": 100, "preview_psnr": 1.0}]
    (tmp_path / "pace" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_queue.read_pace(plan) == {"clips_per_s": 400.0}
    (tmp_path / "export").mkdir()
    figures = {"all": {"value": 0.83, "se": 0.01, "n": 500}}
    (tmp_path / "export" / "plain.json").write_text(json.dumps({"results": {"alignment": {"iid": {"model": figures}}}}))
    control = gpu_queue.read_control(plan)
    assert control["all"] == 0.83 and control["mixture_gain_points"] == pytest.approx(-3.0)
