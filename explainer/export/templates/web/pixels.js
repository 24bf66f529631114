// From a picture to the network's image and back, by the same rules as in Python (explainer/geometry.py and Pillow's bilinear filter).

// Where the picture lies in the network's image: source and target are [top, left, height, width] in whole pixels.
export function placement(geometry, H, W, h, w) {
  if (geometry === "letterbox") {
    const scale = Math.min(h / H, w / W);
    const height = Math.min(h, Math.max(1, even(H * scale))), width = Math.min(w, Math.max(1, even(W * scale)));
    return {source: [0, 0, H, W], target: [Math.floor((h - height) / 2), Math.floor((w - width) / 2), height, width]};
  }
  if (geometry === "crop") {
    const scale = Math.min(H / h, W / w);
    const height = Math.min(H, Math.max(1, even(h * scale))), width = Math.min(W, Math.max(1, even(w * scale)));
    return {source: [Math.floor((H - height) / 2), Math.floor((W - width) / 2), height, width], target: [0, 0, h, w]};
  }
  return {source: [0, 0, H, W], target: [0, 0, h, w]};
}

// Python rounds halves to the even number.
function even(value) {
  const low = Math.floor(value);
  return value - low === 0.5 ? low + (low % 2) : Math.round(value);
}

// For each of `out` positions the first of `length` inputs that it reads, and their weights: a triangle as wide as the reduction.
function triangles(length, out) {
  const scale = length / out, reach = Math.max(scale, 1);
  return Array.from({length: out}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5)), last = Math.min(length, Math.floor(centre + reach + 0.5));
    const weights = Array.from({length: last - first}, (_, j) => Math.max(0, 1 - Math.abs((first + j - centre + 0.5) / reach)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return {first, weights: weights.map(weight => weight / sum)};
  });
}

// A plane [height, width] at another size. `whole`: values are rounded after each direction, as in 8-bit pictures.
export function resize(plane, height, width, outHeight, outWidth, whole = false) {
  let values = plane;
  if (width !== outWidth) {
    const columns = triangles(width, outWidth), wide = new Float32Array(height * outWidth);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < outWidth; x++) {
        const {first, weights} = columns[x], start = y * width + first;
        let sum = 0;
        for (let j = 0; j < weights.length; j++) sum += weights[j] * values[start + j];
        wide[y * outWidth + x] = whole ? Math.round(sum) : sum;
      }
    }
    values = wide;
  }
  if (height === outHeight) return values;
  const rows = triangles(height, outHeight), tall = new Float32Array(outHeight * outWidth);
  for (let y = 0; y < outHeight; y++) {
    const {first, weights} = rows[y], sums = new Float64Array(outWidth);
    for (let j = 0; j < weights.length; j++) {
      const start = (first + j) * outWidth;
      for (let x = 0; x < outWidth; x++) sums[x] += weights[j] * values[start + x];
    }
    for (let x = 0; x < outWidth; x++) tall[y * outWidth + x] = whole ? Math.round(sums[x]) : sums[x];
  }
  return tall;
}

// RGBA bytes of a part of a picture, cut out and laid on padding: float32 [3, h, w] in [0,1].
export function networkImage(pixels, width, place, h, w, padding) {
  const [top, left, partHeight, partWidth] = place.source, [y0, x0, inHeight, inWidth] = place.target;
  const image = new Float32Array(3 * h * w);
  for (let channel = 0; channel < 3; channel++) {
    const plane = new Float32Array(partHeight * partWidth);
    for (let y = 0; y < partHeight; y++) {
      for (let x = 0; x < partWidth; x++) plane[y * partWidth + x] = pixels[4 * ((top + y) * width + left + x) + channel];
    }
    const small = resize(plane, partHeight, partWidth, inHeight, inWidth, true), start = channel * h * w;
    image.fill(padding[channel] / 255, start, start + h * w);
    for (let y = 0; y < inHeight; y++) {
      for (let x = 0; x < inWidth; x++) image[start + (y0 + y) * w + x0 + x] = small[y * inWidth + x] / 255;
    }
  }
  return image;
}

// A mask [rows, columns] of the network's image [h, w] in the picture's own pixels; 0 where the network saw nothing.
export function inPicture(mask, rows, columns, place, h, w, H, W) {
  const full = rows === h && columns === w ? mask : resize(mask, rows, columns, h, w);
  const [y0, x0, inHeight, inWidth] = place.target, [top, left, partHeight, partWidth] = place.source;
  const inner = new Float32Array(inHeight * inWidth);
  for (let y = 0; y < inHeight; y++) inner.set(full.subarray((y0 + y) * w + x0, (y0 + y) * w + x0 + inWidth), y * inWidth);
  const part = resize(inner, inHeight, inWidth, partHeight, partWidth);
  const whole = new Float32Array(H * W);
  for (let y = 0; y < partHeight; y++) whole.set(part.subarray(y * partWidth, (y + 1) * partWidth), (top + y) * W + left);
  return whole;
}
