"""What an operator sees of ckptd: Grafana dashboards, and Prometheus rules, made from lists in Python.

``python -m dashboards`` writes the files beside this one; a test holds that they are what the lists say.
"""
