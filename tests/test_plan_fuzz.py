"""Plans nobody would write: always a proved plan or a PlanError with a way out, within a second."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator

import pytest
from headers import make_config, write_folder
from oracle import Model, open_model

from tpx.errors import PlanError
from tpx.mesh import AXES
from tpx.plan.find import shipped_plans
from tpx.plan.load import parse_plan
from tpx.plan.proofs import prove
from tpx.plan.types import STYLES

FEW, MANY = 300, 10_000
SECOND = 1.0
SHIPPED = [path.read_text() for path in shipped_plans("gpt_oss").values()]
WORDS = re.findall(r"[\w.*{},]+|[:{}\[\],]", "".join(SHIPPED))
ODD = ["", "~", "null", "1e3", "010", "0x8", "-1", "1.5", "99999999999999999999", "&a", "*a", "!!x"]
ODD += ["|", ">", "? a", "- ", "---", "...", "%YAML 1.1", "'", '"', "#", "\t", "\0", "\ufeff", "é"]
ODD += ["{" * 40, "[" * 40, "{a,b}" * 9, "*.*", "..", "a..b", "{}", "{,}", "<<", "=", "@", "`"]
PATTERNS = sorted(set(re.findall(r"^  (\S+): ", "".join(SHIPPED), re.MULTILINE)))
PATTERNS += ["{model,lm_head}", "*", "model.layers.0", "model.layers.*.mlp"]
LETTERS = "abxyz019 :{}[],*.-_#'\"\n\t&!|>%@`"


def document(draw: random.Random) -> str:
    """Every second one is lines of any words; the others have a plan's keys with any values."""
    if draw.random() < 0.5:
        return "\n".join(_some(draw, draw.randint(0, 5)) for _ in range(draw.randint(0, 14)))
    axes, few = draw.sample(AXES, 3), draw.sample(PATTERNS, draw.randint(0, 9))
    sizes = [f"{axis}: {draw.choice([0, 1, 2, 2, 4, 4, 8, 3])}" for axis in axes]
    rules = [f'  "{pattern}": {_style(draw)}' for pattern in few]
    if draw.random() < 0.3:
        rules.append(f"  {_some(draw, 1).strip() or '*'}: {_style(draw)}")
    keys = ["tpx: 1", f"model: {draw.choice(['gpt_oss', 'gpt_oss', _some(draw, 1)])}"]
    keys += [f"mesh: {{{', '.join(sizes)}}}", "\n".join(["modules:", *rules])]
    if draw.random() < 0.3:
        limit = draw.choice(["memory", "context", "batch", "max_replicated", "x"])
        keys.append(f"limits: {{{limit}: {draw.choice(['0', '0.5', '1KB', '9GiB', '010', '7'])}}}")
    draw.shuffle(keys)
    return "\n".join(keys[: draw.choice([len(keys), len(keys), 3])])


def _some(draw: random.Random, count: int) -> str:
    words = (draw.choice(WORDS if draw.random() < 0.8 else ODD) for _ in range(count))
    return " " * draw.choice([0, 0, 2, 4]) + draw.choice([" ", ": "]).join(words)


def _style(draw: random.Random) -> str:
    style = draw.choice([*STYLES * 4, "expert", _some(draw, 1).strip()])
    option = draw.choice(["", "", "dispatch: gather", "dispatch: replicated", "uneven: true"])
    return f"{{style: {style}, {option}}}" if option else style


def edited(draw: random.Random) -> str:
    """A shipped plan with one to four small changes."""
    text = draw.choice(SHIPPED)
    for _ in range(draw.randint(1, 4)):
        text = draw.choice(EDITS)(draw, text)
    return text


def _letter(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return text[:at] + draw.choice(LETTERS) + text[at + draw.randint(0, 1) :]


def _word(draw: random.Random, text: str) -> str:
    found = list(re.finditer(r"[\w.*{},]+", text))
    if not found:
        return text
    one = draw.choice(found)
    return text[: one.start()] + draw.choice(WORDS + ODD) + text[one.end() :]


def _number(draw: random.Random, text: str) -> str:
    found = list(re.finditer(r"\d+", text))
    if not found:
        return text
    one = draw.choice(found)
    number = draw.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 10**6, 10**18])
    return f"{text[: one.start()]}{number}{text[one.end() :]}"


def _line(draw: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    if not lines:
        return text
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    match draw.randint(0, 3):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = " " * draw.randint(0, 4) + lines[at].lstrip()
    return "".join(lines)


def _restyle(draw: random.Random, text: str) -> str:
    found = list(re.finditer("|".join(STYLES), text))
    if not found:
        return text
    one = draw.choice(found)
    return text[: one.start()] + draw.choice(STYLES) + text[one.end() :]


EDITS: list[Callable[[random.Random, str], str]] = [_letter, _word, _number, _line, _restyle]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    made = make_config(num_local_experts=4, intermediate_size=224, vocab_size=257)
    return open_model(write_folder(tmp_path_factory.mktemp("headers"), made))


def outcome(text: str, model: Model) -> str:
    """accepted, or the code of the refusal; raises where there is no clean answer in time."""
    begin = time.process_time()
    said = "accepted"
    try:
        plan = parse_plan(text, "fuzz.yaml")
        prove(plan, model.spec, model.layout, model.index, plan.mesh.world, model.family)
    except PlanError as error:
        said = str(error.code)
        clear = error.hint is not None or re.search(r", lines? \d+", error.message)
        if not clear or error.code is None or "`fuzz.yaml`" not in error.message:
            raise AssertionError(f"no line, hint or code: {error.render()!r}\n{text}") from error
    except Exception as error:
        raise AssertionError(f"no clean answer to:\n{text!r}") from error
    taken = time.process_time() - begin
    assert taken <= SECOND, f"{taken:.2f} s for:\n{text!r}"
    return said


def outcomes(make: Callable[[random.Random], str], count: int, model: Model) -> Iterator[str]:
    for seed in range(count):
        yield outcome(make(random.Random(seed)), model)


@pytest.mark.parametrize("make", [document, edited])
def test_any_text_has_a_clean_answer(model, make):
    assert len(set(outcomes(make, FEW, model))) > 8  # not one reason for all


@pytest.mark.soak
@pytest.mark.parametrize("make", [document, edited])
def test_ten_thousand_texts_have_clean_answers(model, make):
    assert len(set(outcomes(make, MANY, model))) > 12


HUGE = {
    "a mesh of more ranks than there are": (
        "{dp: 1000000000, edp: 1000000000}",
        "plan `fuzz.yaml` is for 1,000,000,000 ranks, more than 16,384",
        "P419",
    ),
    "etp of more ranks than there are": (
        "{tp: 1000000, etp: 1000000}",
        "plan `fuzz.yaml` is for 1,000,000 ranks, more than 16,384",
        "P419",
    ),
}


@pytest.mark.parametrize("case", HUGE)
def test_sizes_that_would_take_long_are_refused_at_once(model, case):
    mesh, message, code = HUGE[case]
    text = re.sub(r"mesh: .*", f"mesh: {mesh}", SHIPPED[0])
    assert outcome(text, model) == code
    plan = parse_plan(text, "fuzz.yaml")
    with pytest.raises(PlanError) as error:
        prove(plan, model.spec, model.layout, model.index, plan.mesh.world, model.family)
    assert error.value.message == message
