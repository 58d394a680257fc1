"""How a report looks: one style sheet, light and dark as the reader's system is."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c2127; --soft: #5d6773; --line: #dfe3e8; --page: #ffffff; --card: #f6f7f9;
  --good: #2f7d5b; --bad: #c05a2b; --error: #8a8f98; --mark: #2f6fab;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --soft: #98a2ae; --line: #323a44; --page: #14181d; --card: #1c2228;
    --good: #58b48a; --bad: #e08a5b; --error: #767d87; --mark: #6ea8dc;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 650; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.8rem 0 .6rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 50rem; }
.soft, caption, th { color: var(--soft); }
.tiles { font-variant-numeric: tabular-nums; display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.6rem 0 0; }
.tile { flex: 1 1 8.5rem; background: var(--card); border-radius: .5rem; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.4rem; font-weight: 650; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .86rem; }
.scroll { overflow-x: auto; margin-bottom: 1.4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: .86rem; text-align: left; }
th, td { padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n { white-space: nowrap; }
th.n, td.n { text-align: right; }
tr.total td { font-weight: 600; }
.bar { position: relative; height: .8rem; min-width: 5rem; background: var(--card); border-radius: .2rem; }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; background: var(--good); border-radius: .2rem; opacity: .85; }
.bar u { position: absolute; top: 50%; height: 0; border-top: 2px solid var(--ink); }
.grid { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .9rem; align-items: center; }
.cells { display: flex; flex-wrap: wrap; gap: 2px; }
.cells i, .key i { display: inline-block; width: .82rem; height: .82rem; border-radius: .15rem; }
.cells i.success, .key i.success { background: var(--good); }
.cells i.failure, .key i.failure { background: var(--bad); }
.cells i.error, .key i.error {
  background: repeating-linear-gradient(45deg, var(--error) 0 2px, transparent 2px 4px); border: 1px solid var(--error);
}
.key { color: var(--soft); font-size: .86rem; margin-top: .6rem; }
.key i { margin: 0 .35rem 0 1.1rem; vertical-align: -.1rem; }
.key i:first-child { margin-left: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem; }
.plots { margin-bottom: 1.6rem; }
figure { margin: 0 0 1rem; }
.plots figure { margin: 0; }
svg { max-width: 100%; height: auto; color: var(--ink); }
figcaption { color: var(--soft); font-size: .86rem; }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.2rem; }
.films figure { margin: 0; }
.films video { width: 100%; display: block; border-radius: .4rem; background: #000; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
pre { background: var(--card); padding: .9rem; border-radius: .4rem; overflow-x: auto; font-size: .82rem; }
td.fact { overflow-wrap: anywhere; }
"""
