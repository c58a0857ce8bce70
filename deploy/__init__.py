"""What runs around eigenwatch: Prometheus rules, Grafana dashboards and their push, containers."""
