"""Ranks that share matrices compute what one rank computes alone."""

from dataclasses import replace

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.shared_rows_run import Case, on, train
from tests.small_run import GLOBAL_BATCH
from tests.test_context_parallel import assert_alike, merged

SLOW = pytest.mark.slow
# Two key heads for four of queries, embedding and head in one; rows of documents with borders at no cut.
LLAMA = Case("llama3", overrides={"n_kv_heads": 2, "tie_word_embeddings": True}, document_mask=True)
RAVEN = Case("raven")


def test_a_llama_whose_ranks_share_matrices_trains_as_one_rank_does():
    alone = run_on_ranks(1, train, replace(LLAMA, sections=on(rows=GLOBAL_BATCH)))[0]
    for found in run_on_ranks(2, train, replace(LLAMA, sections=on(tensor=2, rows=GLOBAL_BATCH))):
        assert_alike(found, alone)


def test_a_raven_whose_ranks_share_matrices_draws_the_same_state_and_trains_and_reports_as_one_rank_does():
    sections = {"training": {"loss_chunk_tokens": 5, "z_loss_weight": 1e-3}}
    alone = run_on_ranks(1, train, merged(RAVEN, on(rows=GLOBAL_BATCH), sections))[0]
    ranks = run_on_ranks(2, train, merged(RAVEN, on(tensor=2, rows=GLOBAL_BATCH), sections))
    for found in ranks:
        assert found["depths"] == alone["depths"]
        assert_alike(found, alone)
    assert len(ranks[0]["telemetry"]) == 9
    parts = [rank["states"][0] for rank in ranks]
    assert torch.equal(torch.cat(parts, dim=1), alone["states"][0]), "the same noise, bit for bit"
