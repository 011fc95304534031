"""One self-contained page about a run or a suite: which rule did best, how sure that is, and which tokens it kept.

Reads the files a run leaves behind (metrics.jsonl, eval.jsonl, config.yaml, token bank, fixed-context tables) and nothing else.
"""
