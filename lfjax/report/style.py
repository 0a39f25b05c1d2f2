"""The report's style sheet and its few lines of script (readings under the pointer; the page is whole without them)."""

CSS = """
:root{--paper:#faf9f6;--card:#fff;--ink:#1c1b19;--soft:#5d5a54;--faint:#8a867e;--line:#e4e0d8;--grid:#efece5;
--was:#8d8778;--is:#0f6b74;--is-soft:#d9ecec;--third:#9a5b86;--alarm:#a8350f;--alarm-soft:#fbe9e1;--watch:#8a6100;
--watch-soft:#faf0d6;--ok:#2f6f3e;--ok-soft:#e3f0e3;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#141517;--card:#1c1e21;--ink:#ebe8e1;--soft:#b0aca3;--faint:#85817a;
--line:#303337;--grid:#282b2f;--was:#a39d8d;--is:#66c7cc;--is-soft:#17393c;--third:#d79bc4;--alarm:#ff9a72;
--alarm-soft:#3d2117;--watch:#e5bd5c;--watch-soft:#362b12;--ok:#8fd09b;--ok-soft:#1a3020}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 Inter,ui-sans-serif,
system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:44px 28px 80px}
h1,h2,h3{line-height:1.2;margin:0;font-weight:650;letter-spacing:-.012em;text-wrap:balance}
h1{font-size:clamp(30px,5.2vw,50px);letter-spacing:-.026em;margin:10px 0 14px}
h2{font-size:22px;margin:0 0 6px}
h3{font-size:15px;letter-spacing:0}
p{margin:0 0 12px;max-width:68ch;text-wrap:pretty}
section{margin-top:54px}
.eyebrow{font-size:13px;color:var(--soft);letter-spacing:.02em;overflow-wrap:anywhere}
.eyebrow b{color:var(--ink);font-weight:600}
.lead{font-size:19px;line-height:1.5;color:var(--ink)}
.soft{color:var(--soft)}
.small{font-size:14px}
.note{border-left:3px solid var(--line);padding:2px 0 2px 16px;color:var(--soft);font-size:15px;margin-top:18px}
.stages{display:flex;flex-wrap:wrap;gap:6px 8px;list-style:none;margin:22px 0 0;padding:0;font-size:13.5px}
.stages li{border:1px solid var(--line);border-radius:99px;padding:3px 12px;background:var(--card);color:var(--soft)}
.stages .done::before{content:"✓ ";color:var(--ok)}
.stages .started{color:var(--watch);border-color:currentColor}
.stages .started::before{content:"… "}
.stages .missing{border-style:dashed;color:var(--faint);background:none}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:11px 12px;border-top:1px solid var(--line);vertical-align:middle}
thead th{border-top:0;font-size:12.5px;font-weight:500;color:var(--soft);padding-top:2px;padding-bottom:8px}
.num{text-align:right;white-space:nowrap}
.compare{padding:12px 6px 4px}
.compare th[scope=row]{font-weight:600}
.compare th small{display:block;font-weight:400;color:var(--soft);font-size:13px;line-height:1.35}
.compare td.after{font-weight:650;font-size:18px}
.compare td.before{color:var(--soft);font-size:18px}
.compare td.shape{width:190px}
.dumbbell{display:block;width:100%;max-width:180px}
.dumbbell .rail{stroke:var(--grid);stroke-width:3;stroke-linecap:round}
.dumbbell .span{stroke:var(--is);stroke-width:3;opacity:.4}
.dumbbell .was{fill:var(--card);stroke:var(--was);stroke-width:2}
.dumbbell .is{fill:var(--is)}
.dumbbell .human{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:2 2}
.checks{list-style:none;margin:16px 0 0;padding:0}
.checks li{display:grid;grid-template-columns:210px 1fr;gap:4px 22px;padding:14px 16px;border-top:1px solid var(--line)}
.checks li:first-child{border-top:0}
.checks p{margin:0;font-size:15px;color:var(--soft)}
.checks .alarm{background:var(--alarm-soft)}
.checks .alarm p,.checks .watch p{color:var(--ink)}
.checks.card{padding:0;overflow:hidden}
.pill{display:inline-block;font-size:12.5px;font-weight:600;border-radius:5px;padding:1px 7px;margin-top:4px}
.pill.alarm{color:var(--alarm);box-shadow:inset 0 0 0 1px currentColor}
.pill.watch{background:var(--watch-soft);color:var(--watch)}
.pill.ok{background:var(--ok-soft);color:var(--ok)}
.pill.unknown{background:var(--grid);color:var(--soft)}
.pairs{margin-top:16px}
.pair{display:grid;grid-template-columns:1fr 1fr;border-top:1px solid var(--line)}
.pair:first-child{border-top:0}
.pair>div{padding:14px 18px;min-width:0}
.pair>div+div{border-left:1px solid var(--line)}
.pairs.card{padding:0}
.text{font:17px/1.5 ui-serif,Charter,Georgia,"Liberation Serif",serif;margin:0;
white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{color:var(--faint)}
.is-after .answer{color:var(--ink)}
.figures{display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 0 0;font-size:12.5px;color:var(--soft)}
.figures b{font-weight:600;color:var(--ink)}
.tag{font-size:12.5px;color:var(--soft);margin:0 0 4px}
.is-after .tag{color:var(--is);font-weight:600}
.grid{stroke:var(--grid)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:14px;margin-top:16px}
.two{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px;margin-top:16px}
figure{margin:0;min-width:0}
figcaption{display:flex;justify-content:space-between;gap:10px;align-items:baseline;margin-bottom:2px}
figcaption .last{font-size:18px;font-weight:650;white-space:nowrap}
.unit{font-size:12.5px;color:var(--soft);display:flex;justify-content:space-between;gap:10px;flex-wrap:wrap;
margin:0 0 6px}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px}
.legend i{
display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--is);vertical-align:middle;
margin-right:5px}
.legend i.second{background:var(--third)}.legend i.third{background:var(--was)}
.chart{display:block;width:100%;height:auto;touch-action:pan-y}
.chart text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.chart .name,.chart .marked{fill:var(--faint)}
.chart .axis{stroke:var(--line)}
.line{fill:none;stroke:var(--is);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.line.second{stroke:var(--third)}.line.third{stroke:var(--was)}
.line.faint{stroke:var(--is);opacity:.28;stroke-width:1}
.line.path{opacity:.35;stroke-width:1.3}
.dot{fill:var(--is)}.dot.second{fill:var(--third)}.dot.third{fill:var(--was)}
.mark{stroke:var(--faint);stroke-dasharray:3 3}
.end.first{fill:var(--card);stroke:var(--was);stroke-width:2}
.end.last{fill:var(--is)}
.chart .endname,.chart .marked{paint-order:stroke;
stroke:var(--card);stroke-width:3.5px;stroke-linejoin:round}
.chart .endname{font-weight:600;fill:var(--ink)}
.cursor{stroke:var(--ink);opacity:0;stroke-width:1}
.chart.live .cursor{opacity:.45}
.bar{display:block;height:7px;border-radius:4px;background:var(--grid);overflow:hidden;min-width:50px}
.bar span{display:block;height:100%;background:var(--is)}
.bar.was span{background:var(--was)}
.words td{padding:6px 12px;font-size:15px}
.words .bars{width:55%}
.words .bar+.bar{margin-top:3px}
.scroll{overflow-x:auto}
details{margin-top:14px}
summary{cursor:pointer;color:var(--is);font-weight:550;padding:6px 0}
summary:focus-visible{outline:2px solid var(--is);outline-offset:3px;border-radius:4px}
.keys td,.keys th{padding:5px 12px;font-size:13.5px;font-weight:400}
.keys td,code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:13px;
overflow-wrap:anywhere}
footer{margin-top:60px;color:var(--faint);font-size:13.5px;border-top:1px solid var(--line);padding-top:14px}
@media(max-width:640px){
main{padding:26px 16px 60px}section{margin-top:42px}.lead{font-size:17px}
.compare thead{display:none}.compare tr{display:grid;grid-template-columns:1fr 1fr 1fr;border-top:1px solid var(--line);
padding:12px 10px}.compare tr:first-child{border-top:0}.compare th,.compare td{border:0;padding:2px 0}
.compare th[scope=row]{grid-column:1/-1}.compare td.shape{grid-column:1/-1;width:auto;padding-top:6px}
.dumbbell{max-width:none}.num{text-align:left}
.compare td::before{content:attr(data-label);display:block;font-size:12px;font-weight:400;color:var(--soft)}
.compare td.shape::before{content:none}.compare td.before,.compare td.after{font-size:17px}
.checks li{grid-template-columns:1fr}.pair{grid-template-columns:1fr}
.pair>div{padding:12px 14px}.pair>div+div{border-left:0;padding-top:0}.card{padding:14px 12px}
.checks.card,.pairs.card{padding:0}}
@media print{.card{break-inside:avoid}}
"""

SCRIPT = """
for(const svg of document.querySelectorAll('svg.chart')){
  const lines=JSON.parse(svg.dataset.lines),cursor=svg.querySelector('.cursor');
  const out=svg.parentElement.querySelector('.last'),rest=out.textContent,box=svg.viewBox.baseVal;
  const show=event=>{
    const r=svg.getBoundingClientRect(),x=(event.clientX-r.left)/r.width*box.width;
    const y=(event.clientY-r.top)/r.height*box.height,flat=svg.dataset.x==='step';
    const near=lines.map(l=>l.points.reduce((a,p)=>{
      const far=q=>flat?Math.abs(q[0]-x):Math.hypot(q[0]-x,q[1]-y);return far(p)<far(a)?p:a}));
    cursor.setAttribute('x1',near[0][0]);cursor.setAttribute('x2',near[0][0]);
    cursor.setAttribute('y1',12);cursor.setAttribute('y2',box.height-28);
    svg.classList.add('live');
    out.textContent=near.map(p=>p[3]).join(' · ')+' at '+near[0][2];
  };
  const hide=()=>{svg.classList.remove('live');out.textContent=rest};
  svg.addEventListener('pointermove',show);svg.addEventListener('pointerdown',show);
  svg.addEventListener('pointerleave',hide);
}
"""
