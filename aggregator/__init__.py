"""What runs on the Ray side: merge, solve, measure, judge, store, expose."""
