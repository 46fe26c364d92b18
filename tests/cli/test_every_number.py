"""Every option of every command that takes a number: what lies outside its range is refused, never bent."""

import pytest

from minigpt.cli import flags
from minigpt.core.config import bounds, options
from minigpt.core.errors import UsageError
from minigpt.stages import STAGES

COMMANDS = [command for stage in STAGES for command in flags.stage_commands(stage).values()]
NUMBERS = [(c, o) for c in COMMANDS for o in options(c.config) if o.type in (int, float) and not o.many]
# A value below the usual ones that an option takes, and what it means then.
MEANINGS = {
    "seed": {"0"}, "val_split": {"0"}, "warmup": {"0"}, "decay": {"0"}, "min_lr": {"0"}, "weight_decay": {"0"},
    "beta1": {"0"}, "beta2": {"0"},  # none of it, or the first of its kind
    "clip": {"0"}, "skip_spikes": {"0"}, "top_k": {"0"},  # switched off, as their help says
    "temperature": {"0"}, "top_p": {"0"},  # the likeliest token alone
    "min_p": {"0"}, "presence_penalty": {"0", "-1"}, "frequency_penalty": {"0", "-1"},  # below 0: encourages
    "rows": {"0"}, "limit": {"0"}, "smooth": {"0"}, "from_step": {"0"},  # show none, or from the first on
}  # fmt: skip


@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=[f"{c.name} {o.flag}" for c, o in NUMBERS])
def test_a_number_out_of_range_is_refused(command, option):
    """0, -1, nan and inf: refused with the flag and, for 0 and -1, the range; or a meaning of their own."""
    given = {o.name: "x" for o in options(command.config) if o.meta["argument"] and o.name != option.name}
    for text in ("0", "-1", "nan", "inf", "-inf", "1e400"):
        request = flags.Request(command, {**given, option.name: text})
        if text in MEANINGS.get(option.name, ()) and not (option.name == "rows" and command.name == "eval"):
            flags.resolve(request, {})
            continue
        with pytest.raises(UsageError) as e:
            flags.resolve(request, {})
        assert option.flag in e.value.message and e.value.code == 2
        if "out of range" in e.value.message:
            assert bounds(option) in e.value.fix


def test_a_yaml_file_has_no_way_around(tmp_path):
    """`.nan` and `.inf` are numbers to YAML, and to no option."""
    for key in ("max_time", "rank_timeout", "lr", "epochs", "steps"):
        for value in (".nan", ".inf", "-.inf"):
            (tmp_path / "a.yaml").write_text(f"{key}: {value}\n")
            command = flags.stage_commands("pretrain")[""]
            with pytest.raises(UsageError, match=key):
                flags.resolve(flags.Request(command, {"config": [str(tmp_path / "a.yaml")]}), {})
