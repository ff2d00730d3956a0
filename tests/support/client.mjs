// The TypeScript SDK as a client of ours: what it sees over stdio or HTTP, in one era, as one line of JSON.
//   node client.mjs auto|legacy '{"url": …, "key": …}' | '{"command": …, "args": […]}'
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

const [era, where] = [process.argv[2], JSON.parse(process.argv[3])];
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

const call = (name, given, options) => client.callTool({ name, arguments: given }, options);
const submitted = await call("submit_task", { prompt: "x", repository: "none" });
const task_id = submitted.structuredContent.task_id;
const progress = [];
const waited = await call(
  "get_task",
  { task_id, wait_seconds: 1 },
  { onprogress: (report) => progress.push(report.message) },
);
const refused = await call("submit_task", { promt: "x" });
const logs = await call("get_task_logs", { task_id });
const cancelled = await call("cancel_task", { task_id });
console.log(
  JSON.stringify({
    version: client.getNegotiatedProtocolVersion(),
    server: client.getServerVersion()?.name,
    tools: (await client.listTools()).tools.length,
    waited: waited.structuredContent.status,
    progressed: progress.length > 0,
    refused: [refused.isError, refused.structuredContent.code],
    logs: logs.content[0].text.includes(task_id),
    cancelled: [cancelled.structuredContent.status, cancelled.structuredContent.changed],
  }),
);
await client.close();
