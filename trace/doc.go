// Package trace tells how requests live: when each came to a device, was mapped, waited for a copy, was issued to the
// device below and completed, on which queue and which CPU.
//
// # Design
//
//	Tracer    one for each device that is traced. Whoever owns a request tells it of the request's stages
//	          (block.Tracer), copy engines tell it of their copies (kcopyd.Watcher)
//	ring      where a queue's records go: bounded, many writers, one reader. A record that finds no room is dropped and
//	          counted: nobody who traces makes a request wait
//	Analyzer  puts records together to lives, and lives to a Summary
//
// A device that is not traced has no Tracer, and its requests carry no span: a mark is then a branch that is never taken,
// and none at all on the way of a request that need not wait (dm.Device.Trace). While a request is traced it costs about
// four records, and one question to the kernel on which CPU it is.
//
// A request keeps its queue, so the records of one request are all in one ring, in order. The rings are not in order among
// each other, and need not be.
package trace
