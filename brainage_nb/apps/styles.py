"""How the app and the page to print look."""

APP_STYLE = """
/* The prediction app: one quiet column, legible at arm's length and on a phone. */
.block-container { max-width: 1060px; padding-top: 2.2rem; padding-bottom: 3rem; }
h1 {
  font-size: 2rem !important; font-weight: 650 !important; letter-spacing: -0.01em;
  padding-bottom: 0.2rem !important;
}
h2 {
  font-size: 1.15rem !important; font-weight: 600 !important; color: #33414e;
  margin-top: 0.2rem !important; padding-top: 0.4rem !important;
}
[data-testid="stMetricLabel"] p { color: #54606c; font-size: 0.85rem; }
[data-testid="stMetricValue"] { font-size: 2rem; font-weight: 600; }
.st-key-result [data-testid="stColumn"]:first-child [data-testid="stMetricValue"] {
  color: #0072b2; font-size: 2.7rem; line-height: 1;
}
.notice {
  color: #54606c; font-size: 0.85rem; border-left: 3px solid #d55e00;
  padding-left: 0.8rem; margin-top: 2rem;
}
@media (max-width: 640px) {
  .block-container { padding: 1.2rem 0.9rem 2rem; }
  h1 { font-size: 1.55rem !important; }
}
"""

PAGE_STYLE = """
@page { size: A4; margin: 14mm }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; max-width: 46em;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.35em; margin: 0 } h2 { font-size: 1em; margin: 1.3em 0 .3em }
.age { font-size: 2.6em; font-weight: 600; color: #0072B2; line-height: 1.1 }
.age small { font-size: .4em; color: #54606c; font-weight: 400 }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 400; color: #54606c }
th, td { padding: .18em .6em .18em 0; border-bottom: 1px solid #e4e8ec; vertical-align: top }
figure { margin: .8em 0; break-inside: avoid } img { max-width: 100% }
figcaption { color: #54606c; font-size: .85em }
ul { margin: .2em 0; padding-left: 1.2em }
.notice, .test { border-left: 3px solid #D55E00; padding-left: .8em }
footer { color: #54606c; font-size: .8em; margin-top: 1.5em }
"""
