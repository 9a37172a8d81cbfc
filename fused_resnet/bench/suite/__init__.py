"""Running a benchmark: what is measured (tasks), who takes part (contenders), and how (the runner)."""
