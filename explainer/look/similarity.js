// Similarity overlays. Inlined by similarity.py; all names from outside are set as text.
'use strict';
(function () {
  const data = JSON.parse(document.getElementById('data').textContent), SIDE = 256, DARK = 0.88;
  const state = { image: 0, x: 0.5, y: 0.5, kept: false, low: 0, parts: false };
  const COLOURS = ['230,60,50', '40,120,230', '60,180,70', '240,190,30', '150,80,200', '40,190,190', '240,120,200', '130,90,50'];
  // The namespace of drawings, without an address in the file.
  const SVG = document.createRange().createContextualFragment('<svg></svg>').firstChild.namespaceURI;
  let waiting = false;

  function bytes(text) {
    const raw = atob(text), out = new Int8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  const unsigned = text => new Uint8Array(bytes(text).buffer), words = text => new Int16Array(bytes(text).buffer);
  for (const layer of data.layers) {
    const c = layer.channels, v = layer.vectors = bytes(layer.data), norms = layer.norms = new Float32Array(v.length / c);
    for (let p = 0; p < norms.length; p++) {
      let sum = 0;
      for (let i = p * c; i < p * c + c; i++) sum += v[i] * v[i];
      norms[p] = Math.sqrt(sum);
    }
    if (layer.components) layer.parts = unsigned(layer.components.data);
    if (layer.neighbors) layer.near = words(layer.neighbors.data);
    if (layer.chart) layer.curves = bytes(layer.chart);
  }
  // The patch of a layer at a place of an image.
  function patch(layer) {
    const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    return [at(state.y, layer.height), at(state.x, layer.width)];
  }
  function similarities(layer) {
    const c = layer.channels, v = layer.vectors, [row, column] = patch(layer);
    const own = (state.image * layer.height + row) * layer.width + column, a = own * c, out = new Float32Array(layer.norms.length);
    for (let p = 0; p < out.length; p++) {
      const length = layer.norms[p] * layer.norms[own];
      let sum = 0;
      if (length > 0) for (let i = 0, b = p * c; i < c; i++, b++) sum += v[a + i] * v[b];
      out[p] = length > 0 ? sum / length : 0;
    }
    return out;
  }
  // How much a patch holds of each component, 1 for the most that any patch holds.
  function shares(layer, image, y, x) {
    const count = layer.components.count, start = ((image * layer.height + y) * layer.width + x) * count;
    return Array.from(layer.parts.subarray(start, start + count), v => v / 255);
  }
  // What is said under a row: components, nearest patches, chart.
  function facts(layer, row, column) {
    if (layer.parts) {
      const own = shares(layer, state.image, row, column);
      layer.legend.replaceChildren(...own.map(function (share, k) {
        const item = document.createElement('span');
        item.style.borderLeft = '.8rem solid rgb(' + COLOURS[k % COLOURS.length] + ')';
        item.textContent = (k + 1) + ': ' + share.toFixed(2);
        return item;
      }));
    }
    if (layer.near) {
      const m = layer.neighbors, start = ((state.image * layer.height + row) * layer.width + column) * m.count * 3;
      for (let i = 0; i < m.count; i++) {
        const [image, place, cosine] = layer.near.subarray(start + 3 * i, start + 3 * i + 3), found = data.found[image], canvas = layer.crops[i];
        const across = found.element.naturalWidth / m.width, down = found.element.naturalHeight / m.height, x = place % m.width, y = Math.floor(place / m.width);
        // Three patches a side, moved inside.
        const wide = Math.min(3, m.width) * across, high = Math.min(3, m.height) * down;
        const left = Math.min(Math.max(0, (x + 0.5) * across - wide / 2), found.element.naturalWidth - wide);
        const top = Math.min(Math.max(0, (y + 0.5) * down - high / 2), found.element.naturalHeight - high);
        canvas.getContext('2d').drawImage(found.element, left, top, wide, high, 0, 0, canvas.width, canvas.height);
        canvas.setAttribute('aria-label', found.name);
        canvas.parentNode.querySelector('figcaption').textContent = (cosine / 1000).toFixed(2) + ' ' + found.name;
        canvas.dataset.found = [image, place, cosine].join('/');
      }
    }
    if (layer.curves) chart(layer, row, column);
  }
  function chart(layer, row, column) {
    const P = data.chart.labels.length, start = ((state.image * layer.height + row) * layer.width + column) * P;
    const at = (i, v) => [40 + i * 540 / Math.max(1, P - 1), 15 + (1 - v) * 60];
    const tag = (name, values) => { const e = document.createElementNS(SVG, name); for (const k in values) e.setAttribute(k, values[k]); return e; };
    const parts = [], runs = [[]], said = [];
    for (const v of [1, 0, -1]) {
      parts.push(tag('line', { x1: 40, x2: 580, y1: at(0, v)[1], y2: at(0, v)[1], stroke: 'currentColor', 'stroke-opacity': 0.25 }));
      const text = tag('text', { x: 34, y: at(0, v)[1] + 4, 'text-anchor': 'end' }); text.textContent = v; parts.push(text);
    }
    for (let i = 0; i < P; i++) {
      const value = layer.curves[start + i], text = tag('text', { x: at(i, 0)[0], y: 150, 'text-anchor': 'middle' });
      text.textContent = data.chart.labels[i]; parts.push(text);
      said.push(value === -128 ? '' : (value / 100).toFixed(2));
      if (value === -128) { runs.push([]); continue; }
      runs[runs.length - 1].push(at(i, value / 100));
      parts.push(tag('circle', { cx: at(i, 0)[0], cy: at(0, value / 100)[1], r: i === state.image ? 6 : 3, fill: 'var(--accent)' }));
    }
    for (const run of runs) parts.push(tag('polyline', { points: run.map(p => p.join(',')).join(' '), fill: 'none', stroke: 'var(--accent)', 'stroke-width': 2 }));
    layer.plot.replaceChildren(...parts);
    layer.plot.dataset.values = said.join(' ');
    layer.plot.setAttribute('aria-label', 'similarity by ' + data.chart.title + ': ' + said.map((s, i) => data.chart.labels[i] + ' ' + (s || 'outside')).join(', '));
  }
  function draw() {
    waiting = false;
    for (const layer of data.layers) {
      const found = similarities(layer), size = layer.height * layer.width, [row, column] = patch(layer);
      data.images.forEach(function (image, n) {
        const canvas = layer.canvases[n], context = canvas.getContext('2d'), w = canvas.width / layer.width, h = canvas.height / layer.height;
        context.drawImage(image.element, 0, 0, canvas.width, canvas.height);
        let best = -1;
        for (let y = 0; y < layer.height; y++) {
          for (let x = 0; x < layer.width; x++) {
            const s = found[n * size + y * layer.width + x], own = n === state.image && y === row && x === column;
            if (!own) best = Math.max(best, s);
            const shown = Math.max(0, (s - state.low) / (1 - state.low));
            // Whole pixels: neighbours must not leave seams.
            const left = Math.round(x * w), top = Math.round(y * h);
            const fill = function (style) {
              context.fillStyle = style;
              context.fillRect(left, top, Math.round((x + 1) * w) - left, Math.round((y + 1) * h) - top);
            };
            if (state.parts && layer.parts) {
              fill('rgba(0,0,0,0.45)');
              shares(layer, n, y, x).forEach((share, k) => fill('rgba(' + COLOURS[k % COLOURS.length] + ',' + 0.85 * share + ')'));
            } else fill(s < 0 ? 'rgba(20,60,200,' + DARK + ')' : 'rgba(0,0,0,' + DARK * (1 - shown) + ')');
          }
        }
        if (n === state.image) {
          context.lineWidth = 2;
          for (const [colour, by] of [['#000', 0], ['#fff', 2]]) {
            context.strokeStyle = colour;
            context.strokeRect(column * w + by, row * h + by, Math.max(2, w - 2 * by), Math.max(2, h - 2 * by));
          }
        }
        canvas.parentNode.querySelector('small').textContent = 'most similar: ' + best.toFixed(2);
        canvas.dataset.best = best.toFixed(4);
      });
      facts(layer, row, column);
    }
    document.getElementById('where').textContent = data.images[state.image].name + (state.kept ? ' (kept: click to let go)' : '');
    document.body.dataset.drawn = [state.image, ...patch(data.layers[0]), state.low].join('/');
  }
  function later() { if (!waiting) { waiting = true; requestAnimationFrame(draw); } }

  function row(layer) {
    const section = document.createElement('section'), title = document.createElement('h2'), facts = document.createElement('small');
    section.className = 'layer';
    title.textContent = layer.name;
    facts.textContent = layer.width + ' × ' + layer.height + ' patches, ' + layer.channels + ' channels';
    title.append(facts);
    const figures = document.createElement('div');
    figures.className = 'row';
    layer.canvases = data.images.map(function (image, n) {
      const figure = document.createElement('figure'), canvas = document.createElement('canvas'), caption = document.createElement('figcaption');
      const scale = SIDE / Math.max(image.element.naturalWidth, image.element.naturalHeight);
      canvas.width = Math.max(1, Math.round(image.element.naturalWidth * scale));
      canvas.height = Math.max(1, Math.round(image.element.naturalHeight * scale));
      canvas.tabIndex = 0;
      canvas.setAttribute('role', 'img');
      canvas.setAttribute('aria-label', image.name + ', layer ' + layer.name);
      canvas.dataset.layer = layer.name; canvas.dataset.image = String(n);
      canvas.getContext('2d').imageSmoothingEnabled = scale < 2;
      function move(event) {
        const box = canvas.getBoundingClientRect();
        state.image = n; state.x = (event.clientX - box.left) / box.width; state.y = (event.clientY - box.top) / box.height;
        later();
      }
      canvas.addEventListener('pointermove', e => { if (!state.kept && e.pointerType !== 'touch') move(e); });
      canvas.addEventListener('click', function (e) { state.kept = !state.kept && e.detail > 0; move(e); });
      canvas.addEventListener('keydown', function (e) {
        const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
        if (!step) return;
        e.preventDefault();
        const [r, c] = patch(layer), to = (value, count) => (Math.min(count - 1, Math.max(0, value)) + 0.5) / count;
        if (state.image !== n) { state.image = n; } else { state.x = to(c + step[0], layer.width); state.y = to(r + step[1], layer.height); }
        later();
      });
      const name = document.createElement('span'), small = document.createElement('small');
      name.textContent = image.name; small.style.display = 'block';
      caption.append(name, small); caption.title = image.name;
      figure.append(canvas, caption);
      figures.append(figure);
      return canvas;
    });
    section.append(title, figures);
    if (layer.components) { layer.legend = document.createElement('p'); layer.legend.className = 'legend'; section.append(layer.legend); }
    if (layer.chart) {
      layer.plot = document.createElementNS(SVG, 'svg');
      layer.plot.setAttribute('viewBox', '0 0 600 160'); layer.plot.setAttribute('role', 'img'); layer.plot.setAttribute('class', 'plot');
      section.append(layer.plot);
    }
    if (layer.neighbors) {
      const near = document.createElement('div'), heading = document.createElement('h3');
      near.className = 'row near'; heading.textContent = 'Nearest patches of the folder';
      layer.crops = [];
      for (let i = 0; i < layer.neighbors.count; i++) {
        const figure = document.createElement('figure'), canvas = document.createElement('canvas'), caption = document.createElement('figcaption');
        canvas.width = canvas.height = 96; canvas.setAttribute('role', 'img');
        layer.crops.push(canvas); figure.append(canvas, caption); near.append(figure);
      }
      section.append(heading, near);
    }
    return section;
  }
  const low = document.getElementById('low');
  function level() { state.low = Number(low.value) / 100; document.getElementById('low-text').textContent = state.low.toFixed(2); later(); }
  low.addEventListener('input', level);
  const parts = document.getElementById('parts');
  parts.addEventListener('change', function () { state.parts = parts.checked; later(); });
  parts.parentNode.hidden = !data.layers.some(layer => layer.components);
  Promise.all([...data.images, ...data.found].map(function (image) {
    image.element = new Image();
    image.element.src = image.picture;
    return image.element.decode();
  })).then(function () {
    document.getElementById('layers').append(...data.layers.map(row));
    level();
  });
})();
