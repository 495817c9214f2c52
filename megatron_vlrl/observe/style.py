"""The look of the report and of its charts, light or dark as the reader's system asks; --c0 to --c7 colour curves."""

CHART_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1c2128;--muted:#667080;--line:#dfe3e8;
    --good:#dcf3e3;--bad:#fbe2e0;--alarm:#b3261e;--c0:#2563c9;--c1:#d9730d;--c2:#2b8a4b;--c3:#b83280;
    --c4:#7a52c7;--c5:#0e8a94;--c6:#a17a00;--c7:#6b7280}
@media(prefers-color-scheme:dark){
  :root{--bg:#14171b;--card:#1d2127;--ink:#e4e8ed;--muted:#98a2b0;--line:#343b45;--good:#17402a;--bad:#4d2422;
    --alarm:#ff8f86;--c0:#6aa5ff;--c1:#ffa454;--c2:#63cf8a;--c3:#f285bd;--c4:#b79bff;--c5:#4fd0da;--c6:#e0bb45;
    --c7:#a5afbd}
}
svg text{fill:var(--muted);font-size:11px}
.grid{stroke:var(--line);stroke-width:1}
polyline{fill:none;stroke:var(--c);stroke-linejoin:round}
.line{stroke-width:2}
.raw{stroke-width:1;opacity:.28}
.dashed{stroke-dasharray:5 3}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
"""

_PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:24px 20px 60px;background:var(--bg);color:var(--ink);
    font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:26px}
h2{margin:36px 0 12px;font-size:19px}
.muted{color:var(--muted)}
.alarm{color:var(--alarm);white-space:normal;overflow-wrap:anywhere}
nav a{margin-right:16px;color:var(--c0);text-decoration:none}
.facts{display:flex;flex-wrap:wrap;gap:10px 28px;margin:14px 0;padding:0;list-style:none}
.facts b{display:block;font-size:19px;font-weight:600}
.card,.chart,details{background:var(--card);border:1px solid var(--line);border-radius:8px}
.card{padding:14px 16px;overflow-x:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
.chart{margin:0;padding:12px 14px 8px}
.chart figcaption{font-weight:600}
.chart svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;padding:0;list-style:none;font-size:12.5px;
    color:var(--muted)}
.legend b{color:var(--ink)}
.line-mark{display:inline-block;width:14px;height:3px;margin:0 5px 3px 0;border-radius:2px;background:var(--c)}
.dot-mark{display:inline-block;width:8px;height:8px;margin-right:5px;border-radius:50%;background:var(--c)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{color:var(--muted);font-weight:500;font-size:13px}
th:first-child,td:first-child{text-align:left}
td,th{white-space:nowrap}
tr:last-child td{border-bottom:0}
.total td{font-weight:600;border-top:2px solid var(--line)}
.good{background:var(--good)}
.bad{background:var(--bad)}
details{margin:10px 0}
summary{padding:10px 16px;cursor:pointer;font-weight:600}
details>div,details>pre{margin:0;padding:4px 16px 14px}
.group{display:grid;grid-template-columns:minmax(120px,250px) 1fr;gap:18px;padding:14px 0;
    border-top:1px solid var(--line)}
.group img{display:block;width:100%;max-width:250px;margin-bottom:8px;border:1px solid var(--line);
    border-radius:4px}
.group>div{min-width:0;overflow-x:auto}
.prompt{margin:0 0 8px}
pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,monospace}
td .text{display:block;min-width:220px}
@media(max-width:640px){
  .group{grid-template-columns:1fr}
}
"""

STYLE = CHART_STYLE + _PAGE_STYLE
