// Imported before the harness, which has no option for it: every request of its carries the server's key.
import { subscribe } from "node:diagnostics_channel";

const authorization = `Bearer ${process.env.SERVER_KEY}`;
subscribe("undici:request:create", ({ request }) => request.addHeader("authorization", authorization));
subscribe("http.client.request.created", ({ request }) => request.setHeader("authorization", authorization));
