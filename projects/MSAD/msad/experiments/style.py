"""The style sheet of report.html; in a module, so that it is installed with the package."""

STYLE = """\
:root { color-scheme: light; --ink: #222; --grey: #6b6b6b; --faint: #e4e4e4; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 1.2rem; margin: 36px 0 10px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
pre { background: #f5f5f5; padding: 12px 14px; border-radius: 6px; overflow-x: auto; }
dl { margin: 0; }
dd { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 28px; }
.facts dt { color: var(--grey); font-size: .82rem; }
.facts dd { overflow-wrap: anywhere; }
.summary { margin: 0; padding-left: 1.2em; max-width: 75ch; }
.summary li { margin: 6px 0; }
.note { color: var(--grey); font-size: .85rem; max-width: 95ch; }
.scroll { overflow-x: auto; border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--grey); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: #fff; text-align: left; font-weight: 400; }
tbody th { white-space: normal; }
tbody th { border-left: 4px solid var(--grey); }
tbody th small { display: block; color: var(--grey); white-space: normal; }
.result > * { background: #fff3e8 !important; font-weight: 600 !important; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 24px; }
figure { margin: 16px 0 0; }
figure.wide { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--grey); font-size: .85rem; margin-top: 6px; }
.kinds > div { padding: 8px 0; border-bottom: 1px solid var(--faint); }
.kinds dt { font-weight: 600; }
.kinds dd { max-width: 85ch; }
@media (max-width: 600px) {
  body { font-size: 15px; }
  main { padding: 16px 14px 32px; }
  th, td { padding: 6px 8px; }
  th:first-child small { display: none; }
}
"""
