// Draws /openapi.json: each route with its parameters, body, answers and examples.

const element = (name, text = "", className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
};

const code = (value) => element("pre", typeof value === "string" ? value : JSON.stringify(value, null, 2));

function media(content, into) {
  for (const [type, { schema, example }] of Object.entries(content ?? {})) {
    into.append(element("p", type));
    if (example !== undefined) into.append(code(example));
    if (schema && Object.keys(schema).length) {
      const more = element("details");
      more.append(element("summary", `schema ${schema.$ref?.split("/").pop() ?? ""}`), code(resolve(schema)));
      into.append(more);
    }
  }
}

let schemas = {};
const resolve = (schema) => (schema.$ref ? schemas[schema.$ref.split("/").pop()] ?? schema : schema);

function operation(path, method, described) {
  const box = element("details");
  const summary = element("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("code", path), ` ${described.summary ?? ""}`);
  box.append(summary, element("p", described.description ?? ""));
  for (const parameter of described.parameters ?? []) {
    const line = element("p");
    line.append(element("code", parameter.name), ` (${parameter.in}) ${parameter.description ?? ""}`);
    box.append(line);
  }
  if (described.requestBody) {
    box.append(element("h2", "Body"));
    media(described.requestBody.content, box);
  }
  for (const [status, answer] of Object.entries(described.responses ?? {})) {
    box.append(element("h2", `${status} ${answer.description}`));
    media(answer.content, box);
  }
  return box;
}

const documentation = await (await fetch("/openapi.json")).json();
schemas = documentation.components?.schemas ?? {};
const groups = new Map();
for (const [path, methods] of Object.entries(documentation.paths)) {
  for (const [method, described] of Object.entries(methods)) {
    const tag = described.tags?.[0] ?? "other";
    if (!groups.has(tag)) {
      const section = element("section", "", "wide");
      section.append(element("h2", tag));
      groups.set(tag, section);
    }
    groups.get(tag).append(operation(path, method, described));
  }
}
document.getElementById("groups").append(...groups.values());
