"""The fixed-context diagnostic: the same student-written contexts scored before and after training, as functions on tables.

bank -> scoring -> join -> analyses (gain, regions, matching, topn, support, reachability, section3) -> recommend; `pipeline` runs all.
Importing this package imports neither torch nor any engine.
"""
