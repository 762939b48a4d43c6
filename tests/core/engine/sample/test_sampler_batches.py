"""A row of the sampler depends on its own request only: not on its batch, nor on broken rows."""

import math

import pytest
import torch

from tests.support.sampler_pool import CPU, MIXED, Pool, params


class TestReproducibility:
    STEPS = 6

    def run(self, real_V, members, *, slots, device=CPU) -> dict[int, list[int]]:
        """Tokens of the requests `members` (indices into MIXED), generated together."""
        pool = Pool(len(real_V), device, num_slots=32)
        for member in members:
            pool.add(slots[member], params(**MIXED[member]), seed=77 + member, tokens=[1, 2, 3])
        chosen: dict[int, list[int]] = {member: [] for member in members}
        for step in range(self.STEPS):
            gen = [torch.Generator().manual_seed(100 * step + member) for member in members]
            noise_RV = torch.stack([torch.randn(len(real_V), generator=g) for g in gen])
            order = [slots[member] for member in members]
            tokens_R = pool.sample((real_V + noise_RV).to(device), order, [3 + step] * len(order))
            pool.tokens_SL[order, 3 + step] = tokens_R.to(torch.int32)
            for member, token in zip(members, tokens_R.tolist(), strict=True):
                chosen[member].append(token)
        return chosen

    def test_a_request_alone_chooses_as_in_a_batch(self, real_V):
        everyone = list(range(len(MIXED)))
        together = self.run(real_V, everyone, slots=everyone)
        backwards = self.run(real_V, everyone[::-1], slots=[(5 * i + 3) % 32 for i in everyone])
        assert backwards == together
        for member in everyone:
            alone = self.run(real_V, [member], slots={member: 31 - member})
            assert alone[member] == together[member], MIXED[member]

    def test_a_vocabulary_that_blocks_do_not_divide(self, real_V):
        everyone = list(range(len(MIXED)))
        together = self.run(real_V[:9973], everyone, slots=everyone)
        for member in everyone:
            alone = self.run(real_V[:9973], [member], slots=everyone)
            assert alone[member] == together[member], MIXED[member]

    def test_seed_and_position_decide(self, real_V):
        pool = Pool(len(real_V))
        first = [pool.one(real_V, params(), seed=seed) for seed in range(30)]
        assert first == [pool.one(real_V, params(), seed=seed) for seed in range(30)]
        assert len(set(first)) > 5
        by_position = [pool.one(real_V, params(), tokens=[1] * size) for size in range(1, 31)]
        assert len(set(by_position)) > 5

    def test_seeds_use_all_64_bits(self, real_V):
        pool = Pool(len(real_V))
        seeds = [0, 2**32, 2**63, 2**64 - 1, 2**40, 2**50]
        tokens = [
            tuple(pool.one(real_V, params(), seed=seed, tokens=[1] * size) for size in range(1, 9))
            for seed in seeds
        ]
        assert len(set(tokens)) == len(seeds)

    def test_a_preempted_request_goes_on_as_if_nothing_happened(self, real_V):
        """Back in another slot, with its answer so far among its tokens."""
        pool = Pool(len(real_V))
        sampling = params(top_p=0.9, frequency_penalty=0.5, min_tokens=3)
        pool.add(0, sampling, seed=5, tokens=[4, 8])
        tokens = [4, 8]
        for position in range(2, 8):
            tokens.append(int(pool.sample(real_V[None], [0], [position])))
            pool.tokens_SL[0, position] = tokens[-1]
        for known in range(3, 8):
            pool.add(9, sampling, seed=5, tokens=tokens[:known], num_prompt=2)
            assert int(pool.sample(real_V[None], [9], [known])) == tokens[known]

    def test_a_slots_next_request_inherits_nothing(self, real_V):
        pool = Pool(len(real_V))
        pool.add(0, params(**MIXED[15], logit_bias={5: 50.0}, min_tokens=9), tokens=[1, 2])
        pool.sample(real_V[None], [0], [2])
        assert pool.one(real_V, params(temperature=0.0)) == int(real_V.argmax())


class TestBrokenLogits:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("everywhere", [False, True])
    def test_other_rows_do_not_notice(self, real_V, value, everywhere):
        """Every kind of request in turn has the broken row."""
        rows = list(range(len(MIXED)))
        pool = Pool(len(real_V))
        for slot in rows:
            pool.add(slot, params(**MIXED[slot]), seed=slot, tokens=[1, 2], num_prompt=1)
        healthy_RV = real_V.repeat(len(rows), 1)
        expected = pool.sample(healthy_RV, rows, [2] * len(rows)).tolist()
        for broken in rows:
            logits_RV = healthy_RV.clone()
            logits_RV[broken, slice(None) if everywhere else 1234] = value
            tokens = pool.sample(logits_RV, rows, [2] * len(rows)).tolist()
            assert 0 <= tokens[broken] < len(real_V)
            assert tokens[:broken] == expected[:broken]
            assert tokens[broken + 1 :] == expected[broken + 1 :]
            if value == math.inf and not everywhere:
                assert tokens[broken] == 1234
            if value == -math.inf and not everywhere:
                assert tokens[broken] != 1234


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    DEVICE = torch.device("cuda")

    def test_never_waits_for_the_device(self, real_V):
        rows = list(range(len(MIXED)))
        pool = Pool(len(real_V), self.DEVICE)
        for slot in rows:
            pool.add(slot, params(**MIXED[slot]), seed=slot, tokens=[1, 2], num_prompt=1)
        logits_RV = real_V.to(self.DEVICE).repeat(len(rows), 1)
        pool.sample(logits_RV, rows, [2] * len(rows))
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens_R = pool.sample(logits_RV, rows, [2] * len(rows))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert tokens_R.device.type == "cuda"

    def test_chooses_as_on_the_cpu(self, real_V):
        """exp may differ in its last bit, so a rare draw at an edge could too; none does here."""
        rows = list(range(len(MIXED)))
        helper = TestReproducibility()
        on_cpu = helper.run(real_V, rows, slots=rows)
        assert helper.run(real_V, rows, slots=rows, device=self.DEVICE) == on_cpu

    def test_repeats_exactly_also_alone(self, real_V):
        rows = list(range(len(MIXED)))
        helper = TestReproducibility()
        together = helper.run(real_V, rows, slots=rows, device=self.DEVICE)
        for member in rows:
            alone = helper.run(real_V, [member], slots=rows, device=self.DEVICE)
            assert alone[member] == together[member]
