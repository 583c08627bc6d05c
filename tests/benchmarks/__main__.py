"""Run every benchmark; the table of the paper's tasks where LANDSCAPE_DATA_ROOT names their data."""

import os

from tests.benchmarks import (
    bench_curvature,
    bench_distributed,
    bench_distributed_measure,
    bench_gram,
    bench_noise,
    bench_reading,
    bench_recorder,
    bench_slices,
    bench_stacked_step,
    bench_tasks,
)

if __name__ == "__main__":
    bench_stacked_step.main()
    bench_curvature.main([])
    bench_gram.main([])
    bench_noise.main()
    bench_distributed.main([])
    bench_distributed_measure.main([])
    bench_reading.main([])
    bench_recorder.main()
    bench_slices.main([])
    if os.environ.get("LANDSCAPE_DATA_ROOT"):
        bench_tasks.main([])
