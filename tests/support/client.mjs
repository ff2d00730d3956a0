// The TypeScript SDK as a client of ours: what it sees over stdio or HTTP as one line of JSON. Its version 2 speaks both
// eras, its version 1 only the older.
//   node client.mjs auto|legacy|v1 '{"url": …, "key": …}' | '{"command": …, "args": […]}'
const [era, where] = [process.argv[2], JSON.parse(process.argv[3])];
const [{ Client }, { StreamableHTTPClientTransport }, { StdioClientTransport }] = await Promise.all(
  (era === "v1"
    ? ["sdk/client/index.js", "sdk/client/streamableHttp.js", "sdk/client/stdio.js"]
    : ["client", "client", "client/stdio"]
  ).map((path) => import(`@modelcontextprotocol/${path}`)),
);
const transport = where.url
  ? new StreamableHTTPClientTransport(new URL(where.url), {
      requestInit: { headers: { Authorization: `Bearer ${where.key}` } },
    })
  : new StdioClientTransport({ ...where, env: process.env });
const client = new Client(
  { name: "check", version: "1.0.0" },
  era === "auto" ? { versionNegotiation: { mode: "auto" } } : {},
);
await client.connect(transport);

// Once it has the list, the SDK holds every answer against the schema of its tool.
const { tools } = await client.listTools();
const call = (name, given, options) =>
  client.callTool({ name, arguments: given }, ...(era === "v1" ? [undefined, options] : [options]));
const submitted = await call("submit_task", { prompt: "x", repository: "none" });
const task_id = submitted.structuredContent.task_id;
const progress = [];
const waited = await call(
  "get_task",
  { task_id, wait_seconds: 3 },
  { onprogress: (report) => progress.push(report.message) },
);
const refused = await call("submit_task", { promt: "x" });
const logs = await call("get_task_logs", { task_id });
const cancelled = await call("cancel_task", { task_id });
console.log(
  JSON.stringify({
    version: client.getNegotiatedProtocolVersion?.() ?? transport.protocolVersion ?? "untold",
    server: client.getServerVersion()?.name,
    tools: tools.length,
    waited: waited.structuredContent.status,
    progressed: progress.length > 0,
    refused: [refused.isError, refused.structuredContent.code],
    logs: logs.content[0].text.includes(task_id),
    cancelled: [cancelled.structuredContent.status, cancelled.structuredContent.changed],
  }),
);
await client.close();
