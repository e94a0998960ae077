"use strict";
// Reloads the page of a run that goes on. The browser keeps the scroll position, the history which folds are open.
(() => {
  const folds = () => [...document.querySelectorAll("details")].map((fold) => [fold.firstElementChild.textContent, fold]);
  const kept = history.state ?? {};
  for (const [name, fold] of folds()) fold.open = kept[name] ?? fold.open;
  setInterval(() => {
    if (/^#viewer.*open$/.test(location.hash)) return;
    history.replaceState(Object.fromEntries(folds().map(([name, fold]) => [name, fold.open])), "");
    location.reload();
  }, 1000 * Number(document.body.dataset.reload));
})();
