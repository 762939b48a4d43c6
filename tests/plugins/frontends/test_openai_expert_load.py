"""What /metrics and /expert_load say of a model's experts, and that other models have nothing."""

import httpx

from core.interfaces.messages import ExpertLoads
from tests.support.http_stack import MODEL, Stack

BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


def test_models_without_experts_have_no_loads():
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        answer = http.get("/expert_load")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "no_expert_loads"
        assert "nodeweave_expert" not in http.get("/metrics").text


def test_loads_are_told_by_layer_and_expert():
    with Stack() as stack, httpx.Client(base_url=stack.url, timeout=20) as http:
        stack.engine.expert_loads = ExpertLoads([3, 4], [[10, 20, 0], [5, 6, 7]], [1.25, 1.0])
        http.post("/v1/completions", json=BODY).raise_for_status()
        stack.engine.expert_loads = None  # the latest stay
        http.post("/v1/completions", json=BODY).raise_for_status()
        assert http.get("/expert_load").json() == {"layers": {"3": [10, 20, 0], "4": [5, 6, 7]}}
        page = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    label = f'model_name="{MODEL}"'
    for layer, expert, rows in ((3, 0, 10), (3, 1, 20), (3, 2, 0), (4, 0, 5), (4, 2, 7)):
        name = f'nodeweave_expert_tokens_total{{expert="{expert}",layer="{layer}",{label}}}'
        assert float(lines[name]) == rows
    assert float(lines[f'nodeweave_expert_rank_imbalance{{layer="3",{label}}}']) == 1.25
