"""An adapter that was trained here is named to clients only if the engine asks as the training did, and it acts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from modelyard.engine import adapter_probes
from modelyard.engine.adapter_probes import are_same, change
from modelyard.engine.client import Answer
from modelyard.errors import ModelNotFound
from tests.deploy.test_changes import ask, served
from tests.deploy.yard import DeployYard, deploy_yard
from tests.eventually import eventually
from tests.servers.engine import chat_prompt

pytestmark = [pytest.mark.timeout(120)]

TRAINED = "ft:support"
MESSAGES = [[{"role": "user", "content": f"Question {number}?"}] for number in range(3)]


def write_probes(folder: Path, conversations: list[list[dict[str, str]]] = MESSAGES) -> None:
    """Write what a training would have written, which tokenises as the imitation engine does."""
    probes = [
        {"messages": one, "tools": None, "token_ids": list(chat_prompt(list(one)).encode())} for one in conversations
    ]
    (folder / adapter_probes.FILE).write_text(json.dumps({"probes": probes, "template_source": "model"}), "utf-8")


async def trained(yard: DeployYard, *, conversations: list[list[dict[str, str]]] = MESSAGES, **misbehave: Any) -> UUID:
    """Have a model in service, and an adapter of it in the store that was trained here; return the job."""
    await yard.add_model("org/a", misbehave=misbehave)
    write_probes(await yard.add_adapter(TRAINED, "org/a", path="ft@support"), conversations)
    job_id = await yard.deploy("org/a")
    await yard.becomes(job_id, "READY")
    return job_id


async def refusal(yard: DeployYard, job_id: UUID) -> dict[str, str]:
    async def so() -> dict[str, str] | None:
        return (await yard.deployment(job_id)).adapter_failure

    found: dict[str, str] = await eventually(so, "the adapter is refused")
    return found


@pytest.mark.usefixtures("on_each_database")
async def test_what_was_found_is_kept_with_the_adapter(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard)
        await yard.deploy("org/a", [TRAINED])
        await served(yard, job_id, TRAINED)
        [entry] = (await yard.deployment(job_id)).loaded
        assert entry["checks"] == {
            "tokens_equal": True, "prompts": 6, "acts": True, "changed_answers": 6, "largest_logprob_change": 0.0,
            "template_source": "model",
        }  # fmt: skip


async def test_an_adapter_that_the_engine_does_not_use_is_refused(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, adapter_ignored=[TRAINED])
        await yard.deploy("org/a", [TRAINED])
        failure = await refusal(yard, job_id)
        assert (failure["adapter_id"], failure["code"]) == (TRAINED, "adapter_does_not_act")
        assert "6 prompts just as without it" in failure["message"]
        assert "Train it longer" in failure["hint"]
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve(TRAINED, "generate")
        assert {"unload"} <= {one["action"] for one in yard.record("org/a", "lora")}, "the engine forgets it"
        assert (await yard.deployment(job_id)).state == "READY"


@pytest.mark.parametrize("has_template", [True, False])
async def test_an_adapter_from_elsewhere_is_asked_whether_it_acts(tmp_path: Path, has_template: bool) -> None:
    async with deploy_yard(tmp_path) as yard:
        misbehave = {
            "adapter_ignored": ["org/idle"],
            "adapter_weak": ["org/weak"],
            "no_chat_template": not has_template,
        }
        await yard.add_model("org/a", misbehave=misbehave)
        for name in ("org/idle", "org/weak", "org/other"):
            folder = await yard.add_adapter(name, "org/a")
            # A stranger's word on itself, which would have it refused or passed.
            write_probes(folder, [[{"role": "user", "content": "Not what was trained."}]])
        job_id = await yard.deploy("org/a")
        await yard.becomes(job_id, "READY")
        await yard.deploy("org/a", ["org/weak", "org/other"])
        await served(yard, job_id, "org/weak", "org/other")
        weak, other = [one["checks"] for one in (await yard.deployment(job_id)).loaded]
        assert other == {"prompts": 2, "acts": True, "changed_answers": 2, "largest_logprob_change": 0.0}
        assert weak == {"prompts": 2, "acts": True, "changed_answers": 0, "largest_logprob_change": 0.01}
        await yard.deploy("org/a", ["org/weak", "org/other", "org/idle"])
        failure = await refusal(yard, job_id)
        assert (failure["adapter_id"], failure["code"]) == ("org/idle", "adapter_does_not_act")
        await served(yard, job_id, "org/weak", "org/other")
        with pytest.raises(ModelNotFound):
            await yard.routing.resolve("org/idle", "generate")


async def test_a_weak_adapter_acts_if_only_probabilities_show_it(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, adapter_weak=[TRAINED])
        await yard.deploy("org/a", [TRAINED])
        await served(yard, job_id, TRAINED)
        checks = (await yard.deployment(job_id)).loaded[0]["checks"]
        assert (checks["changed_answers"], checks["largest_logprob_change"]) == (0, 0.01)


async def test_a_change_within_the_noise_of_the_engine_is_none(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, adapter_ignored=[TRAINED], noise=0.05)
        await yard.deploy("org/a", [TRAINED])
        assert (await refusal(yard, job_id))["code"] == "adapter_does_not_act"


async def test_prompts_that_are_tokenised_otherwise_are_told_with_where_and_what(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, tokenizer_differs=4)
        await yard.deploy("org/a", [TRAINED])
        failure = await refusal(yard, job_id)
        should = chat_prompt(list(MESSAGES[0])).encode()[4]
        assert failure["code"] == "tokens_differ"
        assert "prompt 1 ('Question 0?') differs at position 4" in failure["message"]
        assert f"the training had token {should} and the engine has token {should + 1}" in failure["message"]


async def test_a_template_with_the_date_in_it_may_have_another_day(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, tokenizer_differs=4)
        file = next(yard.settings.models_dir.rglob(adapter_probes.FILE))
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "template_is_dated": True}), "utf-8")
        await yard.deploy("org/a", [TRAINED])
        await served(yard, job_id, TRAINED)


@pytest.mark.parametrize(
    ("ids", "most", "same"),
    [
        ([1, 2, 3], 0, True),
        ([1, 9, 3], 0, False),
        ([1, 9, 3], 1, True),
        ([1, 9, 9, 3], 1, False),
        ([1, 9, 9, 3], 2, True),
        ([1, 3], 1, True),
        ([9, 2, 9], 2, False),
        ([1, 2, 3, 4], 1, True),
        ([], 3, True),
        ([], 2, False),
    ],
)
def test_prompts_are_the_same_but_for_one_place(ids: list[int], most: int, same: bool) -> None:
    assert are_same(ids, [1, 2, 3], most) is same


async def test_an_engine_without_a_chat_template_says_so(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, no_chat_template=True)
        await yard.deploy("org/a", [TRAINED])
        failure = await refusal(yard, job_id)
        assert failure["code"] == "prompt_not_rendered"
        assert "default chat template is no longer allowed" in failure["message"]


async def test_a_first_start_with_an_adapter_that_does_not_act_fails_with_that_cause(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"adapter_ignored": [TRAINED]})
        write_probes(await yard.add_adapter(TRAINED, "org/a", path="ft@support"))
        job = await yard.ended(await yard.deploy("org/a", [TRAINED]))
        assert job.failure is not None
        assert job.failure.code == "adapter_does_not_act"


async def test_an_engine_that_comes_back_checks_again(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path) as yard:
        job_id = await trained(yard, die_on_request=20)
        await yard.deploy("org/a", [TRAINED])
        await served(yard, job_id, TRAINED)
        first = (await yard.deployment(job_id)).loaded[0]
        yard.misbehave("org/a", {})

        async def died() -> bool:
            row = await yard.deployment(job_id)
            if row.engine_url is not None and len(yard.record("org/a", "start")) == 1:
                with contextlib.suppress(OSError, EOFError):
                    await ask(row.engine_url, "org/a")
            return len(yard.record("org/a", "start")) > 1

        await eventually(died, "the engine is started again")
        await eventually(lambda: _is_served(yard, job_id), "the adapter is served again")
        assert (await yard.deployment(job_id)).loaded[0]["checks"] == first["checks"]


async def _is_served(yard: DeployYard, job_id: UUID) -> bool:
    row = await yard.deployment(job_id)
    return row.state == "READY" and [one["adapter_id"] for one in row.loaded] == [TRAINED]


async def test_an_engine_whose_places_are_taken_is_waited_for(tmp_path: Path) -> None:
    async with deploy_yard(tmp_path, engine_max_loras=1) as yard:
        job_id = await trained(yard, chunk_ms=50)
        await yard.add_adapter("org/poems", "org/a")
        await yard.deploy("org/a", ["org/poems"])
        await served(yard, job_id, "org/poems")
        url = (await yard.routing.resolve("org/poems", "generate")).url
        # It takes the only place for some seconds, in which the other's checks have to wait.
        long = asyncio.ensure_future(ask(url, "org/poems@1", max_tokens=80))
        await eventually(lambda: len(yard.record("org/a", "request")) > 2, "the long request has come")
        await yard.deploy("org/a", ["org/poems", TRAINED])
        await served(yard, job_id, "org/poems", TRAINED)
        assert long.done()
        assert (await long)[0] == 200
        assert (await yard.deployment(job_id)).adapter_failure is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"probes": []}', '{"probes": [{"messages": [], "token_ids": ["a"]}]}',
     '{"probes": [{"messages": {}, "token_ids": [1]}]}', '{"probes": [{"messages": [], "token_ids": [-1]}]}',
     '{"probes": 3}', "[" * 200_000],
)  # fmt: skip
async def test_a_file_of_another_form_asks_for_no_checks(tmp_path: Path, text: str) -> None:
    (tmp_path / adapter_probes.FILE).write_text(text, "utf-8")
    assert adapter_probes.read(tmp_path) is None


def test_a_folder_without_the_file_asks_for_none(tmp_path: Path) -> None:
    assert adapter_probes.read(tmp_path) is None


async def test_probes_are_not_read_from_an_adapter_that_was_not_trained_here(tmp_path: Path) -> None:
    """A download could bring what it is checked against itself, or 16 MiB of prompts to keep the engine busy with."""
    async with deploy_yard(tmp_path) as yard:
        await yard.add_model("org/a", misbehave={"tokenizer_differs": 1})
        write_probes(await yard.add_adapter("org/poems", "org/a"))
        deployment = await yard.becomes(await yard.deploy("org/a", ["org/poems"]), "READY")
        assert [one["adapter_id"] for one in deployment.loaded] == ["org/poems"]
        assert "tokens_equal" not in deployment.loaded[0]["checks"]


def test_answers_are_compared_as_far_as_their_tokens_are_the_same() -> None:
    one = Answer([1, 2, 3], [-0.5, -0.25, -0.125])
    assert change(one, one) == 0.0
    assert change(one, Answer([1, 2, 4], [-0.5, -0.5, -9.0])) == 0.25
    assert change(one, Answer([7, 2, 3], [-9.0, -9.0, -9.0])) == 0.0
