// Similarity overlays. Inlined by similarity.py; all names from outside are set as text.
'use strict';
(function () {
  const data = JSON.parse(document.getElementById('data').textContent), SIDE = 256, DARK = 0.88;
  const state = { image: 0, x: 0.5, y: 0.5, kept: false, low: 0 };
  let waiting = false;

  function bytes(text) {
    const raw = atob(text), out = new Int8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  for (const layer of data.layers) {
    const c = layer.channels, v = layer.vectors = bytes(layer.data), norms = layer.norms = new Float32Array(v.length / c);
    for (let p = 0; p < norms.length; p++) {
      let sum = 0;
      for (let i = p * c; i < p * c + c; i++) sum += v[i] * v[i];
      norms[p] = Math.sqrt(sum);
    }
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
            context.fillStyle = s < 0 ? 'rgba(20,60,200,' + DARK + ')' : 'rgba(0,0,0,' + DARK * (1 - shown) + ')';
            // Whole pixels: neighbours must not leave seams.
            const left = Math.round(x * w), top = Math.round(y * h);
            context.fillRect(left, top, Math.round((x + 1) * w) - left, Math.round((y + 1) * h) - top);
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
    return section;
  }
  const low = document.getElementById('low');
  function level() { state.low = Number(low.value) / 100; document.getElementById('low-text').textContent = state.low.toFixed(2); later(); }
  low.addEventListener('input', level);
  Promise.all(data.images.map(function (image) {
    image.element = new Image();
    image.element.src = image.picture;
    return image.element.decode();
  })).then(function () {
    document.getElementById('layers').append(...data.layers.map(row));
    level();
  });
})();
