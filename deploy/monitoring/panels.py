"""Panels of Grafana dashboards, and where they lie."""

from __future__ import annotations

from typing import Any

_UNITS = {"s": "s", "bytes": "bytes", "share": "percentunit", "": "short"}  # Grafana's names
_WIDTH, _PANEL_WIDTH, _PANEL_HEIGHT, _STAT_HEIGHT = 24, 8, 7, 4
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = dict[str, Any]


def data_source() -> dict[str, Any]:
    """The variable in which a dashboard asks for its Prometheus."""
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def selector(label: str, metric: str) -> dict[str, Any]:
    """A choice among the values that `label` has in a metric, all of them at first."""
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATA_SOURCE,
        "query": {"query": f"label_values({metric}, {label})", "refId": label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def series(title: str, unit: str, description: str, queries: dict[str, str]) -> Panel:
    """Lines over time, three panels in a row; `queries` by legend."""
    defaults = {
        "unit": _grafana_unit(unit),
        "custom": {"lineWidth": 2, "fillOpacity": 0, "showPoints": "auto", "spanNulls": True},
    }
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": DATA_SOURCE,
        "gridPos": {"w": _PANEL_WIDTH, "h": _PANEL_HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": _targets(queries),
    }


def stat(title: str, unit: str, description: str, query: str, legend: str = "") -> Panel:
    """A number of now, six in a row."""
    return {
        "type": "stat",
        "title": title,
        "description": description,
        "datasource": DATA_SOURCE,
        "gridPos": {"w": _WIDTH // 6, "h": _STAT_HEIGHT},
        "fieldConfig": {"defaults": {"unit": _grafana_unit(unit)}, "overrides": []},
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "graphMode": "none",
            "textMode": "value_and_name" if legend else "value",
        },
        "targets": _targets({legend: query}),
    }


def laid_out(panels: list[Panel]) -> list[Panel]:
    """Panels with an id and their place: from left to right, rows of one height."""
    x = y = row = 0
    for number, panel in enumerate(panels, start=1):
        place = panel["gridPos"]
        if x + place["w"] > _WIDTH or (x and place["h"] != row):
            x, y = 0, y + row
        row = place["h"]
        place |= {"x": x, "y": y}
        x += place["w"]
        panel["id"] = number
    return panels


def _targets(queries: dict[str, str]) -> list[dict[str, str]]:
    numbered = enumerate(queries.items(), start=1)
    return [{"refId": f"Q{number}", "expr": expr, "legendFormat": legend} for number, (legend, expr) in numbered]


def _grafana_unit(unit: str) -> str:
    return _UNITS.get(unit, f"suffix: {unit}")
