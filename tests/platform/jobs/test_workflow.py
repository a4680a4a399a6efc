"""What the reader resolves is what the jobs take: a whole workflow, cell by cell, without Ray."""

import json

from kvlab.platform.jobs.local import run_cell
from kvlab.platform.spec.read import load_graph

WORKFLOW = """
version: 1
name: whole
seeds: [0]
model: {width: 32, layers: 2, heads: 2, kv_heads: 1, tie_embeddings: true}
data: {source: {folder: text, pattern: "*.txt"}, tokenizer: {bytes: true}, sequence_length: 32}
jobs:
  base: {train: {method: full_attention, tokens: 1k, batch_size: 4}}
  block:
    matrix: {uptrain.method.block_transformer.block_length: [2, 4]}
    uptrain: {from: base, method: {block_transformer: {block_length: 2}}, tokens: 512}
  taught:
    uptrain:
      from: base
      method: full_attention
      tokens: 512
      batch_size: 4
      distill: {from: base, weight: 0.5, temperature: 2.0}
      lora: {rank: 2}
  quality: {evaluate: {of: [base, block, taught], metrics: [perplexity, loss_by_position]}}
  windowed:
    matrix: {evaluate.apply.sliding_window.window: [4, 8]}
    evaluate: {of: [base, block], apply: {sliding_window: {window: 4}}}
  speed:
    benchmark: {of: [base, block], prompt: 8, generate: 4, batch: [1], repeats: 1, kv_budget: 64kB}
  nothing: {noop: {points: 3}}
"""


def test_every_cell_runs_on_its_resolved_spec(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"Document {i} says {i * i}.\n" * 9)
    path = tmp_path / "workflow.yaml"
    path.write_text(WORKFLOW)
    graph = load_graph(path)
    results = {}
    for number, cell in enumerate(graph.cells):
        inputs = {role: results[parent][0] for role, parent in cell.parents.items()}
        folder = tmp_path / f"{number}"
        result = run_cell(cell.kind, cell.spec, inputs, folder)
        assert json.dumps(result)
        results[cell.name] = folder, result, cell
    hashes = {
        result["targets"]["hash"] for _, result, cell in results.values() if cell.kind == "evaluate"
    }
    assert len(hashes) == 1
    speeds = [result for _, result, cell in results.values() if cell.kind == "benchmark"]
    assert len(speeds) == 3
    assert all(result["largest_batch"] > 1 for result in speeds)
