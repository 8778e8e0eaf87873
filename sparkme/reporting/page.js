// The script of a report. It keeps the reader's choices in the page's address, so that they outlive a reload and can be shared.
'use strict';
(function () {
  var root = document.documentElement;
  window.addEventListener('error', function (event) { root.dataset.error = event.message; });
  root.classList.add('js');
  var all = function (selector, within) { return Array.from((within || document).querySelectorAll(selector)); };
  var state = new URLSearchParams(location.hash.slice(1));
  function list(name) { return (state.get(name) || '').split(',').filter(Boolean); }
  function keep(name, value) {
    if (value === '') { state.delete(name); } else { state.set(name, value); }
    var hash = state.toString();
    history.replaceState(null, '', hash ? '#' + hash : location.pathname + location.search);
  }
  function toggled(name, item, on) {
    var items = list(name).filter(function (other) { return other !== item; });
    if (on) { items.push(item); }
    keep(name, items.join(','));
  }

  // Logarithmic axes.
  all('button[data-log]').forEach(function (button) {
    var name = button.dataset.log, figure = button.closest('.chart');
    function show(on) {
      button.setAttribute('aria-pressed', String(on));
      figure.querySelector('.log').hidden = !on;
      figure.querySelector('.linear').hidden = on;
    }
    button.addEventListener('click', function () {
      var on = button.getAttribute('aria-pressed') !== 'true';
      show(on);
      toggled('log', name, on);
    });
    show(list('log').includes(name));
  });

  // Shown and hidden runs.
  var hidden = new Set(list('hide'));
  function showRuns() {
    all('svg [data-run]').forEach(function (line) { line.classList.toggle('off', hidden.has(line.dataset.run)); });
  }
  all('.runs input').forEach(function (box) {
    box.checked = !hidden.has(box.value);
    box.addEventListener('change', function () {
      if (box.checked) { hidden.delete(box.value); } else { hidden.add(box.value); }
      toggled('hide', box.value, !box.checked);
      showRuns();
    });
  });
  showRuns();

  // Values at the pointer, or at a point chosen with the arrow keys.
  function nearest(xs, x) {
    var low = 0, high = xs.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (xs[middle] < x) { low = middle; } else { high = middle; }
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  }
  function text(value) {
    if (value === 0) { return '0'; }
    var size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
  }
  function element(parent, tag, name) {
    var made = document.createElement(tag);
    made.className = name;
    return parent.appendChild(made);
  }
  all('.chart').forEach(function (figure) {
    var data = JSON.parse(figure.querySelector('script').textContent);
    all('.plot', figure).forEach(function (plot) {
      var xs = plot.dataset.x.split(' ').map(Number), ys = plot.dataset.y.split(' ').map(Number);
      var log = plot.classList.contains('log'), drawn = [], at = null;
      function clear() { drawn.forEach(function (part) { part.remove(); }); drawn = []; }
      function visible() { return data.curves.filter(function (curve) { return !hidden.has(String(curve.run)); }); }
      function draw(x) {
        clear();
        var curves = visible();
        if (!curves.length) { return; }
        var outer = plot.getBoundingClientRect(), inner = plot.querySelector('svg').getBoundingClientRect();
        var left = inner.left - outer.left, top = inner.top - outer.top;
        function across(value) { return left + inner.width * (value - xs[0]) / (xs[1] - xs[0]); }
        var found = curves.map(function (curve) { return { curve: curve, i: nearest(curve.x, x) }; });
        found.sort(function (a, b) { return Math.abs(a.curve.x[a.i] - x) - Math.abs(b.curve.x[b.i] - x); });
        at = found[0].curve.x[found[0].i];
        var rule = element(plot, 'div', 'rule'), tip = element(plot, 'div', 'tip');
        drawn.push(rule, tip);
        rule.style.left = across(at) + 'px'; rule.style.top = top + 'px'; rule.style.height = inner.height + 'px';
        element(tip, 'div', '').textContent = 'epoch ' + text(at) + ', step ' + found[0].curve.s[found[0].i];
        var near = found.filter(function (item) {
          return Math.abs(across(item.curve.x[item.i]) - across(at)) < 24 && (!log || item.curve.y[item.i] > 0);
        });
        near.sort(function (a, b) { return b.curve.y[b.i] - a.curve.y[a.i]; });
        near.forEach(function (item, order) {
          var value = item.curve.y[item.i], colour = 'var(--' + item.curve.style + ')';
          var up = ((log ? Math.log10(value) : value) - ys[0]) / (ys[1] - ys[0]);
          var mark = element(plot, 'div', 'mark');
          mark.style.left = across(item.curve.x[item.i]) + 'px';
          mark.style.top = top + inner.height * (1 - up) + 'px';
          mark.style.background = colour;
          drawn.push(mark);
          if (order === 12) { element(tip, 'div', '').textContent = near.length - 12 + ' more'; }
          if (order >= 12) { return; }
          var row = element(tip, 'div', '');
          if (data.curves.length > 1) { element(row, 'i', '').style.background = colour; }
          row.append((data.curves.length > 1 ? item.curve.label + ': ' : '') + text(value) + data.unit);
        });
        var width = tip.offsetWidth, place = across(at) + 12;
        if (place + width > outer.width) { place = across(at) - 12 - width; }
        tip.style.left = Math.max(0, Math.min(place, outer.width - width)) + 'px';
        tip.style.top = top + 'px';
      }
      plot.addEventListener('pointermove', function (event) {
        var inner = plot.querySelector('svg').getBoundingClientRect();
        draw(xs[0] + (xs[1] - xs[0]) * Math.min(1, Math.max(0, (event.clientX - inner.left) / inner.width)));
      });
      plot.addEventListener('pointerleave', clear);
      plot.addEventListener('blur', clear);
      plot.addEventListener('keydown', function (event) {
        var step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], curves = visible();
        if (event.key === 'Escape') { clear(); }
        if (!step || !curves.length) { return; }
        event.preventDefault();
        var points = curves[0].x, i = at === null ? points.length - 1 - step : nearest(points, at);
        draw(points[Math.min(points.length - 1, Math.max(0, i + step))]);
      });
    });
  });

  // Reconstructions.
  all('.viewer').forEach(function (viewer) {
    var groups = all('.frames', viewer), slider = viewer.querySelector('input'), select = viewer.querySelector('select');
    var output = viewer.querySelector('output'), run = 0, frames = [];
    function epochOf(frame) { return Number(frame.dataset.epoch); }
    function show(i) {
      frames.forEach(function (frame, number) { frame.classList.toggle('shown', number === i); });
      slider.value = i;
      var words = 'epoch ' + epochOf(frames[i]) + ' of ' + epochOf(frames[frames.length - 1]);
      output.textContent = words;
      slider.setAttribute('aria-valuetext', words);
    }
    function choose(number, epoch) {
      run = number;
      groups.forEach(function (group, other) { group.classList.toggle('shown', other === run); });
      frames = all('.frame', groups[run]);
      slider.max = frames.length - 1;
      slider.disabled = frames.length < 2;
      var best = frames.length - 1;
      frames.forEach(function (frame, i) {
        if (epoch !== null && Math.abs(epochOf(frame) - epoch) < Math.abs(epochOf(frames[best]) - epoch)) { best = i; }
      });
      show(best);
    }
    var asked = state.get('epoch');
    var first = groups.findIndex(function (group) { return group.dataset.run === state.get('run'); });
    choose(Math.max(0, first), asked === null || isNaN(Number(asked)) ? null : Number(asked));
    slider.addEventListener('input', function () {
      show(Number(slider.value));
      keep('epoch', Number(slider.value) === frames.length - 1 ? '' : String(epochOf(frames[slider.value])));
    });
    if (select) {
      select.value = groups[run].dataset.run;
      select.addEventListener('change', function () {
        choose(select.selectedIndex, epochOf(frames[slider.value]));
        keep('run', select.value);
      });
    }
  });

  // Commands to copy.
  all('button.copy').forEach(function (button) {
    button.addEventListener('click', function () {
      var code = button.parentElement.querySelector('code'), range = document.createRange(), selection = getSelection();
      range.selectNodeContents(code);
      selection.removeAllRanges();
      selection.addRange(range);
      function say(word) { button.textContent = word; setTimeout(function () { button.textContent = 'copy'; }, 1500); }
      if (navigator.clipboard) {
        navigator.clipboard.writeText(code.textContent).then(function () { say('copied'); }, function () { say('selected'); });
      } else { say(document.execCommand('copy') ? 'copied' : 'selected'); }
    });
  });
  all('a[data-opens]').forEach(function (link) {
    link.addEventListener('click', function (event) {
      var details = document.getElementById(link.dataset.opens);
      event.preventDefault();
      details.open = true;
      details.scrollIntoView();
    });
  });

  // Reload of a page that is rewritten.
  var box = document.querySelector('#reload');
  if (box) {
    box.checked = state.get('reload') !== 'no';
    box.addEventListener('change', function () { keep('reload', box.checked ? '' : 'no'); });
    setInterval(function () { if (box.checked) { location.reload(); } }, 1000 * Number(box.value));
  }
  root.dataset.ready = 'yes';
}());
