"""What `deebert bench` measures: workloads, contenders, and the suites that time them in turn in one run."""
