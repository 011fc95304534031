"""A suite of runs as a table with memory: names (methods), rows and commands (plan), state and locks (memory), running
(runner, process), and what comes out of it (summary, page)."""
