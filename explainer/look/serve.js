// The local page. All text from outside is set as text, never as HTML.
'use strict';
(function () {
  const $ = id => document.getElementById(id), OWN = 'explainer', ALL = 'all', DIM = 0.25, THUMB = 64, THUMBS = 40;
  let model = null, upload = null, picture = null, selected = null, hovered = null, cut = 0, view = 'kept', maps = new Map(), turn = 0;
  const compared = new Set();

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key in made && typeof value !== 'string') made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  function say(text) { $('error').textContent = text; $('error').hidden = !text; }
  async function ask(path, options) {
    let answer;
    try { answer = await fetch(path, options); } catch { throw new Error('The server does not answer. Is it still running?'); }
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error || answer.statusText);
    return content;
  }
  const percent = share => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + '\u00a0%';
  const nameOf = k => k === ALL ? 'All predicted' : model.classes[k];

  // Masks: fetched one by one, when they are first shown.
  function address(path, method, k, more) {
    return path + '?' + new URLSearchParams({ id: upload.id, method: method, class: k, ...(more || {}) });
  }
  function get(method, k) {
    const key = method + '/' + k, own = maps;
    if (own.has(key)) return own.get(key).promise;
    const entry = { found: null };
    entry.promise = ask(address('/map', method, k)).then(function (found) {
      found.values = Uint8Array.from(atob(found.data), c => c.charCodeAt(0));
      found.judged = new Map();
      return entry.found = found;
    });
    entry.promise.catch(() => own.delete(key));
    own.set(key, entry);
    return entry.promise;
  }
  // What the classifier says to the mask as it is shown; asked once the slider rests.
  function judge(figure, method, k, map, mine) {
    const now = cut;
    if (!model.judged || k === ALL || map.judged.has(now)) return;
    setTimeout(async function () {
      if (mine !== turn) return;
      try {
        map.judged.set(now, await ask(address('/judge', method, k, { cut: now })));
        if (mine === turn) describe(figure, k, map);
      } catch (error) { if (mine === turn) figure.querySelector('small').textContent = error.message; }
    }, 150);
  }
  function area(map) {
    let sum = 0;
    for (const v of map.values) sum += cut > 0 ? (v / 255 >= cut ? 1 : 0) : v / 255;
    return sum / map.values.length;
  }

  // Bilinear, as the server does it for files: pixel centres, edges held; 0 outside the part of the picture that the network saw.
  function enlarge(map, width, height) {
    const out = new Float32Array(width * height), columns = [];
    const y0 = Math.round(map.box[0] * height), x0 = Math.round(map.box[1] * width);
    const high = Math.max(1, Math.round((map.box[0] + map.box[2]) * height) - y0), wide = Math.max(1, Math.round((map.box[1] + map.box[3]) * width) - x0);
    for (let x = 0; x < wide; x++) {
      const at = Math.min(Math.max((x + 0.5) * map.width / wide - 0.5, 0), map.width - 1), left = Math.floor(at);
      columns.push([left, Math.min(left + 1, map.width - 1), at - left]);
    }
    for (let y = 0; y < high; y++) {
      const at = Math.min(Math.max((y + 0.5) * map.height / high - 0.5, 0), map.height - 1), top = Math.floor(at), down = at - top;
      const a = top * map.width, b = Math.min(top + 1, map.height - 1) * map.width;
      for (let x = 0; x < wide; x++) {
        const [l, r, right] = columns[x], v = map.values;
        const upper = v[a + l] + (v[a + r] - v[a + l]) * right, lower = v[b + l] + (v[b + r] - v[b + l]) * right;
        out[(y0 + y) * width + x0 + x] = (upper + (lower - upper) * down) / 255;
      }
    }
    return out;
  }
  function paint(canvas, source, map, threshold, look) {
    const { width, height, pixels } = source, out = new ImageData(width, height), to = out.data;
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
    const key = width + 'x' + height;
    if (map && !map[key]) map[key] = enlarge(map, width, height);
    const mask = map && map[key];
    for (let i = 0, p = 0; i < width * height; i++, p += 4) {
      let m = mask ? mask[i] : 1;
      if (mask && threshold > 0) m = m >= threshold ? 1 : 0;
      if (look === 'mask') { to[p] = to[p + 1] = to[p + 2] = Math.round(m * 255); } else {
        const grey = (pixels[p] + pixels[p + 1] + pixels[p + 2]) / 3 * DIM * (1 - m);
        to[p] = m * pixels[p] + grey; to[p + 1] = m * pixels[p + 1] + grey; to[p + 2] = m * pixels[p + 2] + grey;
      }
      to[p + 3] = 255;
    }
    canvas.getContext('2d').putImageData(out, 0, 0);
  }
  async function load(path) {
    const image = new Image();
    image.src = path;
    await image.decode();
    const sized = function (width, height) {
      const canvas = element('canvas', { width: width, height: height }), context = canvas.getContext('2d', { willReadFrequently: true });
      context.drawImage(image, 0, 0, width, height);
      return { width: width, height: height, pixels: context.getImageData(0, 0, width, height).data };
    };
    const scale = Math.min(1, THUMB / Math.max(image.naturalWidth, image.naturalHeight));
    const full = sized(image.naturalWidth, image.naturalHeight);
    full.thumb = sized(Math.max(1, Math.round(image.naturalWidth * scale)), Math.max(1, Math.round(image.naturalHeight * scale)));
    return full;
  }

  // Panels: the picture, the Explainer, and what it is compared with.
  function panel(method, title) {
    const figure = element('figure', { 'data-method': method }, element('canvas', { role: 'img', 'aria-label': title }));
    const caption = element('figcaption', null, element('b', null, title), element('small', { class: 'muted' }));
    if (method !== 'picture') {
      for (const kind of ['overlay', 'mask']) caption.append(element('a', { 'data-kind': kind, download: '' }, kind === 'overlay' ? 'overlay.png' : 'mask.png'));
    }
    figure.append(caption);
    return figure;
  }
  function panels() {
    const wanted = [['picture', 'Picture'], [OWN, 'Explainer'], ...model.methods.filter(m => compared.has(m.name)).map(m => [m.name, m.label])];
    const had = new Map(Array.from($('panels').children).map(f => [f.dataset.method, f]));
    $('panels').replaceChildren(...wanted.map(([method, title]) => had.get(method) || panel(method, title)));
    for (const canvas of $('panels').querySelectorAll('canvas')) canvas.classList.toggle('tiny', picture.width < 200);
  }
  function describe(figure, k, map) {
    const parts = [nameOf(k), 'area ' + percent(area(map))], judged = map.judged.get(cut);
    if (judged) parts.push('shown alone p ' + judged.kept.toFixed(2), 'removed p ' + judged.left.toFixed(2));
    if (map.seconds >= 0.05) parts.push(map.seconds.toFixed(1) + ' s');
    if (map.note) parts.push(map.note);
    figure.querySelector('small').textContent = parts.join(' · ');
  }
  async function draw() {
    if (!upload) return;
    const mine = ++turn, k = hovered === null ? selected : hovered, trying = hovered !== null && hovered !== selected;
    panels();
    await Promise.all(Array.from($('panels').children).map(async function (figure) {
      const method = figure.dataset.method, canvas = figure.querySelector('canvas'), small = figure.querySelector('small');
      if (method === 'picture') {
        paint(canvas, picture, null, 0, 'kept');
        small.textContent = upload.width + ' × ' + upload.height + ' pixels';
        return;
      }
      const entry = maps.get(method + '/' + k), ready = entry && entry.found;
      if (method !== OWN && (k === ALL || (trying && !ready))) {
        figure.classList.add('stale');
        if (!trying) small.textContent = 'Explains one class at a time: choose one.';
        return;
      }
      if (!ready) { figure.classList.add('stale'); small.textContent = 'Computing …'; }
      try {
        const map = ready || await get(method, k);
        if (mine !== turn) return;
        paint(canvas, picture, map, cut, view);
        describe(figure, k, map);
        if (!trying) judge(figure, method, k, map, mine);
        figure.classList.remove('stale');
        figure.dataset.drawn = k + '/' + cut + '/' + view;
        for (const link of figure.querySelectorAll('a')) link.href = address('/download', method, k, { kind: link.dataset.kind, cut: cut });
      } catch (error) {
        if (mine === turn) { small.textContent = error.message; figure.classList.add('stale'); }
      }
    }));
  }

  // The list of classes.
  function classButton(k) {
    const score = upload.scores && k !== ALL ? upload.scores[k] : null;
    const numbers = k === ALL ? upload.chosen.length + ' classes' : (score === null ? '' : 'p ' + score.toFixed(2) + ' · ') + 'area ' + percent(upload.areas[k]);
    const text = element('span', null, element('b', null, nameOf(k)), element('small', null, numbers));
    if (k !== ALL) text.append(element('meter', { min: '0', max: '1', value: String(score === null ? upload.areas[k] : score), 'aria-hidden': 'true' }));
    const button = element('button', { type: 'button', 'data-class': String(k), 'aria-pressed': 'false' }, element('canvas', { 'aria-hidden': 'true' }), text);
    button.classList.toggle('predicted', upload.chosen.includes(k));
    const over = () => { if (hovered !== k) { hovered = k; draw(); } }, out = () => { if (hovered !== null) { hovered = null; draw(); } };
    button.addEventListener('pointerenter', e => { if (e.pointerType !== 'touch') over(); });
    button.addEventListener('pointerleave', out);
    button.addEventListener('focus', () => { if (button.matches(':focus-visible')) over(); });
    button.addEventListener('blur', out);
    button.addEventListener('click', () => { hovered = null; choose(k); });
    return button;
  }
  // Captions of other lengths must not move the list under the pointer.
  $('classes').addEventListener('pointerenter', () => { $('panels').style.minHeight = $('panels').offsetHeight + 'px'; });
  $('classes').addEventListener('pointerleave', () => { $('panels').style.minHeight = ''; });
  function choose(k) {
    selected = k;
    for (const b of $('classes').children) b.setAttribute('aria-pressed', String(b.dataset.class === String(k)));
    draw();
  }
  async function list() {
    const value = k => upload.scores ? upload.scores[k] : upload.areas[k];
    const order = model.classes.map((_, k) => k).filter(k => upload.areas[k] !== null).sort((a, b) => value(b) - value(a));
    if (upload.chosen.length > 1) order.splice(upload.chosen.length, 0, ALL);
    $('classes').replaceChildren(...order.map(classButton));
    $('classes').scrollTop = 0;
    $('filter').hidden = model.classes.length <= 24;
    choose(upload.chosen.length ? upload.chosen[0] : order[0]);
    const now = upload;
    for (const button of Array.from($('classes').children).slice(0, THUMBS)) {
      const k = button.dataset.class === ALL ? ALL : Number(button.dataset.class);
      try {
        const map = await get(OWN, k);
        if (upload !== now) return;
        paint(button.querySelector('canvas'), picture.thumb, map, 0, 'kept');
      } catch { return; }
    }
    document.body.dataset.ready = upload.id;
  }
  function filter() {
    const text = $('filter').value.toLowerCase();
    for (const b of $('classes').children) b.hidden = !b.querySelector('b').textContent.toLowerCase().includes(text);
  }

  // Uploads.
  async function send(file) {
    if (!file || !model) return;
    say('');
    if (file.size > model.max_bytes) {
      return say('The file has ' + (file.size / 1048576).toFixed(1) + ' MB, more than the limit of ' + +(model.max_bytes / 1048576).toFixed(3) + ' MB.');
    }
    $('busy').hidden = false;
    try {
      const found = await ask('/explain', { method: 'POST', body: file, headers: { [model.header]: '1', 'Content-Type': 'application/octet-stream' } });
      const before = upload;
      upload = found;
      let next;
      try { next = await load('/picture?id=' + encodeURIComponent(found.id)); } catch { upload = before; throw new Error('The picture could not be shown.'); }
      if (upload !== found) return; // a later upload has overtaken this one
      picture = next; maps = new Map(); hovered = null; turn++;
      $('panels').replaceChildren();
      $('result').hidden = false;
      $('filter').value = '';
      await list();
    } catch (error) { say(error.message); } finally { $('busy').hidden = true; }
  }
  $('file').addEventListener('change', function () { const file = this.files[0]; this.value = ''; send(file); });
  for (const type of ['dragover', 'dragleave', 'drop']) {
    document.addEventListener(type, function (e) {
      e.preventDefault();
      $('drop').classList.toggle('over', type === 'dragover');
      if (type === 'drop' && e.dataTransfer.files.length) send(e.dataTransfer.files[0]);
    });
  }
  document.addEventListener('paste', e => { if (e.clipboardData.files.length) send(e.clipboardData.files[0]); });
  $('cut').addEventListener('input', function () {
    cut = Number(this.value) / 100;
    $('cut-text').textContent = cut ? 'binary, from ' + cut.toFixed(2) : 'soft mask';
    draw();
  });
  $('filter').addEventListener('input', filter);
  for (const button of document.querySelectorAll('[data-view]')) {
    button.addEventListener('click', function () {
      view = button.dataset.view;
      for (const b of document.querySelectorAll('[data-view]')) b.setAttribute('aria-pressed', String(b === button));
      draw();
    });
  }

  ask('/model').then(function (facts) {
    model = facts;
    $('about').textContent = facts.classes.length + ' classes, one forward pass at ' + facts.size.join(' × ') + ' pixels. ' +
      (facts.judged ? 'With the classifier: probabilities and comparisons.' : 'Without the classifier: masks alone.');
    $('limit').textContent = 'At most ' + +(facts.max_bytes / 1048576).toFixed(3) + ' MB. It goes to this server only.';
    for (const m of facts.methods) {
      const button = element('button', { type: 'button', 'data-compare': m.name, 'aria-pressed': 'false' }, m.label);
      button.addEventListener('click', function () {
        if (!compared.delete(m.name)) compared.add(m.name);
        button.setAttribute('aria-pressed', String(compared.has(m.name)));
        draw();
      });
      $('compare').append(button);
    }
    $('compare').hidden = !facts.methods.length;
    document.body.dataset.ready = 'model';
  }).catch(error => say(error.message));
})();
