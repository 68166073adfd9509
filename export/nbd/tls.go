package nbd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

// TLSMode says what a server does about TLS.
type TLSMode int

// The modes.
const (
	TLSOff     TLSMode = iota // no TLS: STARTTLS is refused
	TLSAllow                  // the client decides
	TLSRequire                // nothing but STARTTLS and ABORT is answered before TLS
)

// String is the mode's name.
func (m TLSMode) String() string {
	switch m {
	case TLSOff:
		return "off"
	case TLSAllow:
		return "allow"
	case TLSRequire:
		return "require"
	}
	return fmt.Sprintf("TLSMode(%d)", int(m))
}

// LoadTLS makes a server's configuration from a directory laid out as other NBD servers expect it: server-cert.pem and
// server-key.pem, ca-cert.pem (needed when verifyPeer is true), and ca-crl.pem (optional; only with verifyPeer). With
// verifyPeer a client must present a certificate that the authority signed and that is not on the list of revoked
// ones. TLS 1.2 is the oldest version taken.
func LoadTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("nbd: server certificate: %w", err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if !verifyPeer {
		return config, nil
	}
	authorities, err := loadCertificates(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return nil, fmt.Errorf("nbd: certificate authority: %w", err)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	config.ClientCAs = x509.NewCertPool()
	for _, ca := range authorities {
		config.ClientCAs.AddCert(ca)
	}
	revoked, err := loadRevoked(filepath.Join(dir, "ca-crl.pem"), authorities)
	if err != nil {
		return nil, fmt.Errorf("nbd: revoked certificates: %w", err)
	}
	if len(revoked) > 0 {
		config.VerifyConnection = revoked.verify
	}
	return config, nil
}

// loadCertificates reads all certificates of a PEM file.
func loadCertificates(path string) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: holds no certificate", path)
	}
	return certs, nil
}

// A revokedKey names a certificate: its issuer and its number there.
type revokedKey struct{ issuer, serial string }

// revocations are the certificates that authorities have taken back.
type revocations map[revokedKey]struct{}

// loadRevoked reads a list of revoked certificates in PEM; a file that is not there is an empty list. Every list in
// it must be signed by one of the authorities and must not have expired.
func loadRevoked(path string, authorities []*x509.Certificate) (revocations, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	revoked := revocations{}
	lists := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "X509 CRL" {
			continue
		}
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if err := checkList(list, authorities); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, entry := range list.RevokedCertificateEntries {
			revoked[revokedKey{string(list.RawIssuer), entry.SerialNumber.String()}] = struct{}{}
		}
		lists++
	}
	if lists == 0 {
		return nil, fmt.Errorf("%s: holds no list", path)
	}
	return revoked, nil
}

// checkList tells whether list comes from one of the authorities and is still good.
func checkList(list *x509.RevocationList, authorities []*x509.Certificate) error {
	if !list.NextUpdate.IsZero() && time.Now().After(list.NextUpdate) {
		return fmt.Errorf("the list expired at %s", list.NextUpdate.Format(time.RFC3339))
	}
	err := errors.New("the list's issuer is not one of the authorities")
	for _, ca := range authorities {
		if !bytes.Equal(ca.RawSubject, list.RawIssuer) {
			continue
		}
		if err = list.CheckSignatureFrom(ca); err == nil {
			return nil
		}
	}
	return err
}

// verify refuses a peer with a revoked certificate anywhere in its chains.
func (r revocations) verify(state tls.ConnectionState) error {
	for _, chain := range state.VerifiedChains {
		for _, cert := range chain {
			if _, ok := r[revokedKey{string(cert.RawIssuer), cert.SerialNumber.String()}]; ok {
				return fmt.Errorf("nbd: certificate %s of %q was revoked", cert.SerialNumber, cert.Subject)
			}
		}
	}
	return nil
}

// relay lies below a TLS session and lets the stream under it change from the net.Conn of the handshake to the socket
// of the transmission phase. Only the goroutine that owns both, between the phases, changes it.
type relay struct {
	net.Conn
	wire wire // nil during the handshake
}

func (r *relay) Read(p []byte) (int, error) {
	if r.wire != nil {
		return r.wire.Read(p)
	}
	return r.Conn.Read(p)
}

func (r *relay) Write(p []byte) (int, error) {
	if r.wire != nil {
		return r.wire.Write(p)
	}
	return r.Conn.Write(p)
}

// SetWriteDeadline is what the end of a TLS session uses to say goodbye without waiting for a client that is stuck.
func (r *relay) SetWriteDeadline(t time.Time) error {
	switch {
	case r.wire == nil:
		return r.Conn.SetWriteDeadline(t)
	case t.IsZero():
		return r.wire.limitWrite(0)
	}
	return r.wire.limitWrite(max(time.Until(t), time.Millisecond))
}

// SetDeadline does what SetWriteDeadline does; a read of the transmission phase has no deadline.
func (r *relay) SetDeadline(t time.Time) error {
	if r.wire != nil {
		return r.SetWriteDeadline(t)
	}
	return r.Conn.SetDeadline(t)
}

// Close does nothing in the transmission phase, when the wire's owner closes it.
func (r *relay) Close() error {
	if r.wire != nil {
		return nil
	}
	return r.Conn.Close()
}
