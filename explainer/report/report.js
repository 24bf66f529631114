// The report's behaviour. Inlined by page.py; without it everything is visible, only unsorted.
'use strict';
document.querySelectorAll('table.sortable').forEach(function (table) {
  table.querySelectorAll('thead button').forEach(function (button) {
    button.addEventListener('click', function () {
      var column = Number(button.dataset.column), down = button.dataset.down !== '1', body = table.tBodies[0];
      table.querySelectorAll('thead th').forEach(function (th) { th.removeAttribute('aria-sort'); });
      button.dataset.down = down ? '1' : '0';
      button.closest('th').setAttribute('aria-sort', down ? 'descending' : 'ascending');
      Array.from(body.rows).map(function (row) {
        var cell = row.cells[column], value = cell.dataset.value;
        return [row, column === 0 ? cell.textContent : value === undefined ? NaN : Number(value)];
      }).sort(function (a, b) {
        if (column === 0) return (down ? 1 : -1) * String(a[1]).localeCompare(String(b[1]));
        if (isNaN(a[1]) || isNaN(b[1])) return isNaN(a[1]) - isNaN(b[1]);
        return down ? b[1] - a[1] : a[1] - b[1];
      }).forEach(function (pair) { body.appendChild(pair[0]); });
    });
  });
});
document.querySelectorAll('.plots').forEach(function (plots) {
  plots.querySelectorAll('.legend button').forEach(function (button) {
    button.addEventListener('click', function () {
      var on = button.getAttribute('aria-pressed') !== 'true';
      button.setAttribute('aria-pressed', on ? 'true' : 'false');
      var chosen = Array.from(plots.querySelectorAll('.legend button[aria-pressed=true]')).map(function (b) { return b.dataset.label; });
      plots.classList.toggle('chosen', chosen.length > 0);
      plots.querySelectorAll('.curve').forEach(function (c) { c.classList.toggle('on', chosen.indexOf(c.dataset.label) >= 0); });
    });
  });
});
document.querySelectorAll('.gallery').forEach(function (gallery) {
  var data = JSON.parse(gallery.querySelector('script[type="application/json"]').textContent);
  var holder = gallery.querySelector('.cards'), cards = Array.from(holder.children);
  var metric = gallery.querySelector('.metric'), method = gallery.querySelector('.method'), buttons = gallery.querySelectorAll('[data-order]');
  var order = 'best', seed = 1;
  function random() { seed = (seed * 16807) % 2147483647; return seed / 2147483647; }
  function value(card) {
    var values = data.cards[Number(card.dataset.card)][method.value];
    var v = values ? values[metric.value] : null;
    return v === null || v === undefined ? NaN : v;
  }
  function show() {
    var up = data.metrics[metric.value].up, sign = (order === 'worst') === up ? 1 : -1, list;
    cards.forEach(function (card) {
      var values = data.cards[Number(card.dataset.card)];
      card.querySelectorAll('[data-method]').forEach(function (figure) {
        var v = (values[figure.dataset.method] || {})[metric.value];
        figure.querySelector('small').textContent = v === null || v === undefined ? '' : data.metrics[metric.value].title + ' ' + v.toPrecision(3);
      });
    });
    if (order === 'all') list = cards.slice();
    else if (order === 'random') {
      list = cards.map(function (c) { return [random(), c]; }).sort(function (a, b) { return a[0] - b[0]; }).map(function (p) { return p[1]; });
    } else {
      list = cards.slice().sort(function (a, b) {
        var x = value(a), y = value(b);
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return sign * (x - y);
      });
    }
    list.forEach(function (card, i) { holder.appendChild(card); card.hidden = order !== 'all' && i >= 6; });
    buttons.forEach(function (b) { b.setAttribute('aria-pressed', b.dataset.order === order ? 'true' : 'false'); });
  }
  if (!metric || !method) return;
  gallery.querySelector('.controls').hidden = false;
  metric.addEventListener('change', show);
  method.addEventListener('change', show);
  buttons.forEach(function (b) { b.addEventListener('click', function () { order = b.dataset.order; show(); }); });
  show();
});
