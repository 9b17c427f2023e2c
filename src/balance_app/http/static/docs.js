// The page at /docs allows no script inside of its HTML, so Swagger UI is started here.
"use strict";

const root = document.getElementById("swagger-ui").dataset.root;

// Swagger UI has a dark theme, and leaves it to the page when.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

// Swagger UI does not show `x-codeSamples`: this adds them to each operation, before its answers.
function samplesPlugin({ React }) {
  const e = React.createElement;
  let chosen = "curl";

  function Samples({ samples }) {
    const [label, setLabel] = React.useState(chosen);
    const [copied, setCopied] = React.useState(false);
    const sample = samples.find((each) => each.label === label) || samples[0];
    const choose = (each) => { chosen = each.label; setLabel(each.label); setCopied(false); };
    // Without TLS, and not on this machine, browsers have no clipboard.
    const copy = () => navigator.clipboard.writeText(sample.source).then(() => setCopied(true));
    return e("div", { className: "samples" },
      e("div", { role: "group", "aria-label": "Language" },
        ...samples.map((each) => e("button", {
          key: each.label, type: "button", "aria-pressed": each.label === label, onClick: () => choose(each),
        }, each.label)),
        navigator.clipboard ? e("button", { type: "button", className: "copy", onClick: copy }, copied ? "Copied" : "Copy") : null),
      e("pre", { tabIndex: 0, "aria-label": `Sample in ${sample.label}` }, e("code", null, sample.source)));
  }

  return {
    wrapComponents: {
      responses: (Original, system) => (props) => {
        const found = system.specSelectors.specJson().getIn(["paths", props.path, props.method, "x-codeSamples"]);
        return e(React.Fragment, null, found ? e(Samples, { samples: found.toJS() }) : null, e(Original, props));
      },
    },
  };
}

// What Swagger UI leaves out for people who use a keyboard or a screen reader.
function mend() {
  const each = (selector, change) => document.querySelectorAll(selector).forEach(change);
  each("#swagger-ui select:not([aria-label]):not([id])", (select) => select.setAttribute("aria-label", "Choice"));
  each(".body-param__text:not([aria-label])", (text) => text.setAttribute("aria-label", "Request body"));
  const levels = { 2: "h3.opblock-tag, .models > h4", 3: ".opblock h4", 4: ".opblock h5" };
  for (const [level, selector] of Object.entries(levels)) each(selector, (heading) => heading.setAttribute("aria-level", level));
  each(".copy-to-clipboard button:not([aria-label])", (button) => button.setAttribute("aria-label", "Copy"));
  each("table.responses-table[role]", (table) => table.removeAttribute("role"));
  each("#swagger-ui pre:not([tabindex])", (text) => { text.tabIndex = 0; });
  // A link within a button: the button does the same.
  each(".opblock-summary-control a[href]", (link) => link.removeAttribute("href"));
}

SwaggerUIBundle({
  url: `${root}/openapi.json`,
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  deepLinking: true,
  displayRequestDuration: true,
  displayOperationId: false,
  showCommonExtensions: true,
  tryItOutEnabled: true,
  validatorUrl: "none",
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
  plugins: [samplesPlugin],
  // A proxy may be known by another address than it has told the service.
  responseInterceptor: (answer) => {
    if (answer.url.endsWith("/openapi.json") && answer.text) {
      const served = /"source":"curl[^"]*?(https?:\/\/[^/'"]+)/.exec(answer.text)?.[1];
      if (served && served !== location.origin) {
        answer.text = answer.data = answer.text.replaceAll(served, location.origin);
        answer.obj = answer.body = JSON.parse(answer.text);
      }
    }
    return answer;
  },
});

new MutationObserver(mend).observe(document.getElementById("swagger-ui"), { childList: true, subtree: true });
