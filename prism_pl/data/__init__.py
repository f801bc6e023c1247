"""`python -m prism_pl data ...`: look at data before a run does, and make it: check, pairs, distill."""
