package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"syscall"
)

// WriteJSON answers with v and an HTTP status.
func WriteJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if _, err := w.Write(append(body, '\n')); err != nil {
		return fmt.Errorf("send the answer: %w", err)
	}
	return nil
}

// WriteError answers with err. See AsError for the errno.
func WriteError(w http.ResponseWriter, err error) error {
	e := AsError(err)
	return WriteJSON(w, Status(e.Errno), errorBody{Error: e.Message, Errno: errnoName(e.Errno)})
}

// ReadJSON reads a request's body into v: one JSON value without unknown fields, of at most so many bytes. The errors
// are EINVAL and EMSGSIZE.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any, most int64) error {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return Errorf(syscall.EINVAL, "the body must be of the type application/json")
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, most))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(v)
	if err == nil {
		if _, err = decoder.Token(); errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = errors.New("more than one JSON value")
		}
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return Errorf(syscall.EMSGSIZE, "the body is larger than %d bytes", most)
	}
	return Errorf(syscall.EINVAL, "the body is not what this path takes: %v", err)
}
